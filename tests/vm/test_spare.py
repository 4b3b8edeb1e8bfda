# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""The spare's geometry on a real kernel: room, poison, and copies that data cannot reach."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lab import Disk, Machine
from tests.vm.guest import Guest

MAINS = {512: "main", 4096: "main4k"}


def examine(lab: Machine, block: int, size: str, every_chunk: bool) -> dict[str, Any]:
    spare = lab.attach(Disk("examined", size=size, block=block))
    result: dict[str, Any] = Guest(lab).call(
        "spare",
        name="examined",
        main=lab.disk(MAINS[block]).path,
        spare=spare.path,
        seed=block,
        every_chunk=every_chunk,
    )
    return result


def check(result: dict[str, Any]) -> None:
    assert result["wrong"] == []
    assert result["sectors"] == result["data_sectors"]
    assert result["slots_untouched"], "a write to the data area changed a copy of the metadata"
    assert result["good_copies"] == 7
    assert result["actions"] == ["activate_spare", "create_target"]


@pytest.mark.parametrize(
    ("block", "size"),
    [
        (512, "32M"),
        pytest.param(512, "64M", marks=pytest.mark.soak),
        pytest.param(4096, "32M", marks=pytest.mark.soak),
        pytest.param(4096, "64M", marks=pytest.mark.second),
    ],
)
def test_every_usable_chunk_can_be_written(lab: Machine, block: int, size: str) -> None:
    result = examine(lab, block, size, every_chunk=True)
    check(result)
    assert result["written"] == result["usable"]


@pytest.mark.parametrize("block", [pytest.param(512, marks=pytest.mark.soak), 4096])
def test_the_edges_of_a_large_spare(lab: Machine, block: int) -> None:
    result = examine(lab, block, "1G", every_chunk=False)
    check(result)
    assert result["written"] >= 5


@pytest.mark.soak
@pytest.mark.parametrize("block", [512, 4096])
def test_every_usable_chunk_of_a_large_spare(lab: Machine, block: int) -> None:
    result = examine(lab, block, "1G", every_chunk=True)
    check(result)
    assert result["written"] == result["usable"]
