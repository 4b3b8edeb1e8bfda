# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs modules of the collection one after the other, each in a process of its own.

Standard input: {"steps": [{"id", "module", "args", "check", "host"}, ...], "user": number}.
Standard output: their results by id. Saves what a second start of Python and Ansible's transport
of each module would take in an emulated guest.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

from ansible.module_utils.testing import patch_module_args

PACKAGE = "ansible_collections.dm_remap.storage.plugins.modules"


def run(step: dict, user: int) -> dict:
    """Run one module in a child and return its result."""
    module = importlib.import_module(f"{PACKAGE}.{step['module']}")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        if step["host"] == "unprivileged":
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        try:
            controls = {"_ansible_check_mode": step["check"], "_ansible_diff": True}
            with patch_module_args({**step["args"], **controls}):
                module.main()
        except SystemExit:
            pass
        except BaseException:
            print(json.dumps({"failed": True, "msg": traceback.format_exc()}))
        sys.stdout.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        output = pipe.read()
    os.waitpid(child, 0)
    return json.loads(output)


def main() -> None:
    """Run all steps."""
    request = json.load(sys.stdin)
    json.dump({step["id"]: run(step, request["user"]) for step in request["steps"]}, sys.stdout)


if __name__ == "__main__":
    main()
