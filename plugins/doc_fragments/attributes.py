# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Attributes that every module of the collection has."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  action_group:
    description:
      - Use C(group/dm_remap.storage.storage) in C(module_defaults) to set defaults for all modules
        of the collection.
    support: full
    membership:
      - dm_remap.storage.storage
  platform:
    description: Systems that the module runs on.
    platforms: Linux
    support: full
"""
