# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for the module dm_remap.storage.sectors where there is no device-mapper.

Takes the same arguments, waits at a gate, and writes down what it was called for.
"""

from __future__ import annotations

import json
import os

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Record the call and report like the real module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "ranges": {"type": "list", "elements": "dict", "required": True},
            "expected_generation": {"type": "int"},
        }
    )
    folder = os.environ["DM_REMAP_LOOP_DIRECTORY"]
    call = {"name": module.params["name"], "ranges": module.params["ranges"]}
    record(folder, "begun", call)
    # A FIFO holds the call until the test opens its other end; a file lets it pass.
    with open(os.path.join(folder, "gate")):
        pass
    record(folder, "done", call)
    module.exit_json(
        changed=True, chunks=[{}], recovered=127, lost=[{"start": 1, "count": 1}], generation=2
    )


def record(folder: str, what: str, call: dict) -> None:
    """Append a line to a file of the folder, in one write."""
    handle = os.open(os.path.join(folder, what), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, (json.dumps(call) + "\n").encode())
    os.close(handle)


if __name__ == "__main__":
    main()
