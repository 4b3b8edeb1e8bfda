# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the lint gates, all of them even when one fails, and print which ones did.

Usage: tools/lint.py [GATE...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import results
import yaml
from lay_out_collection import BUILD, COPY, ROOT

CORE = (
    "assembler blockdev boot checks cli/documentation cli/installation cli/programs committing "
    "configuration copies devices devmapper dumps engine errors exchanging ext extents files "
    "first_look format freezing fstab guarding hasty healed healer hiding holding ladder locks "
    "lookup mapping marks memory mending migrating mounted moved moving observing placing plan "
    "plan_activation plan_creation plan_remap plan_removal plan_replacement plan_restore "
    "plan_spares plan_upkeep planner pool reflex replacement replacing request salvage "
    "sizes stack stacking target udev xfs"
).split()
GATE_SECONDS = 300


@dataclass(frozen=True)
class Gate:
    """A command that must succeed, and where it runs."""

    name: str
    command: list[str]
    cwd: Path = ROOT


def gates() -> list[Gate]:
    """Return the lint gates in the order in which they run."""
    python = sys.executable
    core = [f"plugins/module_utils/{name}.py" for name in CORE]
    galaxy = yaml.safe_load((ROOT / "galaxy.yml").read_text())
    artifact = "{namespace}-{name}-{version}.tar.gz".format(**galaxy)
    present = [path for path in core if (ROOT / path).exists()]
    return [
        Gate("ruff check", ["ruff", "check", "."]),
        Gate("ruff format", ["ruff", "format", "--check", "."]),
        Gate("mypy core", ["mypy", *present]),
        Gate("yamllint", ["yamllint", "--strict", "."]),
        Gate("links", [python, "tools/check_links.py"]),
        Gate("dependencies", [python, "tools/check_dependencies.py"]),
        # In the copy, because it is a git repository also where this is an unpacked archive, and
        # reuse leaves out what git ignores.
        Gate("reuse", ["reuse", "lint", "--lines"], COPY),
        Gate("changelog", ["antsibull-changelog", "lint"], COPY),
        Gate(
            "plugin docs",
            ["antsibull-docs", "lint-collection-docs", "--plugin-docs", "--skip-rstcheck", "."],
            COPY,
        ),
        Gate("ansible-lint", ["ansible-lint", "--nocolor"], COPY),
        Gate(
            "artifact",
            ["ansible-galaxy", "collection", "build", "--force", "--output-path", str(BUILD), "."],
            COPY,
        ),
        Gate("artifact's links", [python, "tools/check_links.py", str(BUILD / artifact)]),
    ]


def main(names: list[str]) -> int:
    """Run the named gates, or all."""
    outcomes = {}
    for gate in gates():
        if names and gate.name not in names:
            continue
        outcome = results.run(gate.command, GATE_SECONDS, gate.cwd)
        outcomes[gate.name] = outcome
        print(f"{'ok' if outcome.passed else 'FAILED':6} {outcome.seconds:5.1f} s  {gate.name}")
        if not outcome.passed:
            print(outcome.output, flush=True)
    path = BUILD / "results" / "lint.xml"
    results.write(path, "lint", outcomes)
    print(results.read(path))
    return 0 if all(outcome.passed for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    results.stop_on_signals()
    sys.exit(main(sys.argv[1:]))
