# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Feeds images of spares to the core's readers, by libFuzzer: its options are the arguments."""

from __future__ import annotations

import importlib
import sys

import atheris

# It lets dm_remap be imported, as for the tests.
importlib.import_module("tests.conftest")


def main() -> None:
    """Run until an input fails, or as many runs were made as `-runs` says. Never returns."""
    with atheris.instrument_imports(include=["dm_remap"]):
        from tests.unit.fuzz_scene import examine
    atheris.Setup(sys.argv, examine)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
