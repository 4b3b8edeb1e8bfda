# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the Molecule scenarios on the laid-out collection, and leave no machine behind."""

from __future__ import annotations

import os
import re
import sys

import results
from lay_out_collection import BUILD, COPY

SCENARIO_SECONDS = 1620
DESTROY_SECONDS = 120


def split(outcome: results.Outcome) -> dict[str, results.Outcome]:
    """Return an outcome for each step in Molecule's report, or the whole when there is none."""
    steps = re.findall(r"^(\S+ > \S+): Executed: (\w+)", outcome.output, re.MULTILINE)
    parts = {
        step: results.Outcome(0 if verdict == "Successful" else 1, "", 0.0)
        for step, verdict in steps
    }
    # Molecule leaves the step that failed out of its report.
    if not outcome.passed or not parts:
        parts["molecule test"] = outcome
    return parts


def main(arguments: list[str]) -> int:
    """Run ``molecule test`` with the given arguments, or on all scenarios."""
    environment = {**os.environ, "NO_COLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    command = ["molecule", "test", *(arguments or ["--all"])]
    outcome = results.run(command, SCENARIO_SECONDS, COPY, prefix="", environment=environment)
    if not outcome.passed:
        # A scenario that was stopped for time has not come to its own end.
        results.run(["molecule", "destroy"], DESTROY_SECONDS, COPY, environment=environment)
    path = BUILD / "results" / "test-molecule.xml"
    results.write(path, "molecule", split(outcome))
    print(results.read(path))
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    results.stop_on_signals()
    sys.exit(main(sys.argv[1:]))
