# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes the result of each step as one line of JSON to the file named by STEP_RESULTS."""

from __future__ import annotations

import json
import os

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: step_results
type: notification
short_description: Write the results of the steps of steps.yml to a file
description:
  - Writes the result of each step as one line of JSON.
requirements:
  - the environment variable STEP_RESULTS, the path of the file
"""


class CallbackModule(CallbackBase):
    """Appends a line for each task that belongs to a step."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "step_results"
    CALLBACK_NEEDS_ENABLED = True

    def v2_runner_on_ok(self, result):
        """Note a step that went well."""
        self._write(result, failed=False)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        """Note a step that failed."""
        self._write(result, failed=True)

    def v2_runner_on_unreachable(self, result):
        """Note a step whose host could not be reached."""
        self._write(result, failed=True)

    def _write(self, result, failed):
        step = result._task.get_vars().get("step")
        if step:
            outcome = {**result._result, "failed": failed}
            line = json.dumps({"id": step["id"], "result": outcome}, default=str)
            with open(os.environ["STEP_RESULTS"], "a", encoding="utf-8") as file:
                file.write(line + "\n")
