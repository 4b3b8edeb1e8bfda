# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""A main that takes seconds for a bad sector keeps only the chunk's I/O waiting, and no other
target's."""

from __future__ import annotations

import errno
from statistics import median

import pytest

from tests.lab import Machine
from tests.vm.guest import Guest

BAD = 40_000


@pytest.mark.parametrize(
    "milliseconds", [1500, pytest.param(7000, marks=pytest.mark.soak)], ids=["1.5 s", "7 s"]
)
def test_a_slow_bad_sector_does_not_stop_the_rest(lab: Machine, milliseconds: int) -> None:
    guest = Guest(lab)
    lab.disk("main").fail([(BAD, 1)], op="read")
    lab.disk("scsi").fail([(BAD, 1)], op="read")
    found = guest.call(
        "slow_main",
        disk=guest.path("main"),
        spare=guest.path("spare"),
        quick=guest.path("scsi"),
        quick_spare=guest.path("spare2"),
        bad=BAD,
        milliseconds=milliseconds,
    )
    assert found["errno"] == errno.EILSEQ, "the sector is lost, and nothing else"
    assert (found["lost"], found["extents"]) == ([[BAD, 1]], 1)
    times = found["beside"]
    print(
        f"{len(times)} writes with flush and read beside it in {found['seconds']:.1f} s: median "
        f"{1000 * median(times):.1f} ms, slowest {1000 * times[-1]:.0f} ms"
    )
    # If they waited for the attempts at the sector, as they do for a moment with the first error,
    # it would be one for each.
    assert len(times) > 50
    quick_error, first, seconds = found["quick"]
    print(f"a bad sector of another target: {seconds:.3f} s")
    assert quick_error == errno.EILSEQ
    assert first, "it did not wait for the slow main"
