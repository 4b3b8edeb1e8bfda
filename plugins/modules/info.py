#!/usr/bin/python
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: info
short_description: Report targets, their tables, spares and metadata
version_added: 0.1.0
author:
  - dm_remap.storage contributors (!UNKNOWN)
description:
  - Reports the active targets of a host with their main, spares, remapped chunks, lost sectors,
    metadata generation and device-mapper table.
  - A target whose metadata cannot be read is reported with the reason and does not hide the others.
options:
  name:
    description: Report only this target, which must be active.
    type: str
attributes:
  check_mode:
    description: Changes nothing, so it runs the same in C(check_mode).
    support: full
  diff_mode:
    description: Changes nothing, so there is no difference to show.
    support: N/A
  idempotent:
    description: Never changes anything.
    support: full
  platform:
    description: Systems that the module runs on.
    support: full
    platforms: Linux
seealso:
  - module: dm_remap.storage.target
  - module: dm_remap.storage.sectors
"""

EXAMPLES = r"""
- name: Look at all targets
  dm_remap.storage.info:
  register: storage

- name: Show how full the spares of a target are
  dm_remap.storage.info:
    name: data
  register: storage
"""

RETURN = r"""
targets:
  description: The active targets, by name in ascending order.
  returned: always
  type: list
  elements: dict
  sample:
    - name: data
      device: /dev/mapper/data
      generation: 8
      remapped_chunks: 1
      lost: []
      table:
        - 0 123392 linear main 0
        - 123392 128 linear spare0 0
        - 123520 2097152 linear main 123520
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.engine import Engine
from ..module_utils.errors import DmRemapError
from ..module_utils.report import describe_target


def main() -> None:
    """Observe and report."""
    module = AnsibleModule(argument_spec={"name": {"type": "str"}}, supports_check_mode=True)
    try:
        engine = Engine()
        engine.check_host()
        if module.params["name"] is not None:
            targets = [describe_target(engine.require(module.params["name"]))]
        else:
            targets = [describe(engine, name) for name in engine.target_names()]
    except DmRemapError as error:
        module.fail_json(msg=str(error), device=error.device, remedy=error.remedy)
    module.exit_json(changed=False, targets=targets)


def describe(engine: Engine, name: str) -> dict:
    """One target, or why it cannot be described."""
    try:
        return describe_target(engine.require(name))
    except DmRemapError as error:
        return {"name": name, "device": f"/dev/mapper/{name}", "error": str(error)}


if __name__ == "__main__":
    main()
