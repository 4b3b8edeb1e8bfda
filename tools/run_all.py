# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run every part of the tests, also when one fails, and add up what passed and failed.

Two lanes run side by side, about equally long, because a virtual machine uses one processor.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from dataclasses import dataclass

import results
from lay_out_collection import BUILD, ROOT


@dataclass(frozen=True)
class Part:
    """A target of the Makefile with the longest time that it may take."""

    target: str
    seconds: int


LANES = (
    (Part("test-vm", 5000),),
    (
        Part("lint", 900),
        Part("test-unit", 1800),
        Part("sanity", 1800),
        Part("test-loop", 1200),
        Part("test-vm-13", 3600),
        Part("test-vm-apart", 3000),
        Part("test-molecule", 1800),
    ),
)
# For all parts together; what has not ended by then fails. Half an hour is the aim on two idle
# cores; the limits only end what hangs, because a busy machine is no fault of the tests.
TOTAL_SECONDS = 5150
# What is printed again of a part that failed, since the other lane may have ended long after it.
TAIL_LINES = 40


@dataclass(frozen=True)
class Summary:
    """What a part did."""

    target: str
    outcome: results.Outcome
    counts: results.Counts
    failures: list[str]


def run_part(part: Part, deadline: float) -> Summary:
    """Run one part and read its results; a part that fails without any counts as one failure."""
    report = BUILD / "results" / f"{part.target}.xml"
    report.unlink(missing_ok=True)
    command = ["make", "--no-print-directory", part.target]
    seconds = max(1.0, min(part.seconds, deadline - time.monotonic()))
    outcome = results.run(command, seconds, ROOT, prefix=f"{part.target:13} | ")
    (BUILD / "results" / f"{part.target}.log").write_text(outcome.output)
    counts = results.read(report)
    if not outcome.passed and counts.failed == 0:
        counts += results.Counts(failed=1)
    return Summary(part.target, outcome, counts, results.failures(report))


def main() -> int:
    """Run all lanes, print a table and the sum; 1 when anything failed."""
    results.stop_on_signals()
    started = time.monotonic()
    shutil.rmtree(BUILD / "results", ignore_errors=True)
    (BUILD / "results").mkdir(parents=True)
    summaries: list[Summary] = []

    def run_lane(lane: tuple[Part, ...]) -> None:
        with contextlib.suppress(InterruptedError):
            for part in lane:
                summaries.append(run_part(part, started + TOTAL_SECONDS))

    threads = [threading.Thread(target=run_lane, args=(lane,)) for lane in LANES]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        results.RUNNING.stop()

    for summary in summaries:
        if not summary.outcome.passed:
            print(f"\nThe end of {summary.target}:")
            print("\n".join(summary.outcome.output.splitlines()[-TAIL_LINES:]))

    total = results.Counts()
    print()
    for summary in summaries:
        total += summary.counts
        verdict = "ok" if summary.outcome.passed else "FAILED"
        print(
            f"{verdict:6}  {summary.target:13} {summary.outcome.seconds:6.0f} s  {summary.counts}"
        )
        for failure in summary.failures:
            print(f"        {failure}")
    failed = [summary.target for summary in summaries if not summary.outcome.passed]
    if failed:
        print(f"Failed: {', '.join(failed)}; their output is in .build/results/")
    print(f"Took {time.monotonic() - started:.0f} s")
    print(total)
    expected = sum(len(lane) for lane in LANES)
    return 0 if len(summaries) == expected and not failed and not total.failed else 1


if __name__ == "__main__":
    sys.exit(main())
