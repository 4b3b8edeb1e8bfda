# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""One booted guest for all tests that need one; each test finds it clean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Disk, LabError, Machine

DEFAULT_IMAGE = "debian-12"

# Small, sparse disks of every kind; a test that needs another one plugs it in.
DISKS = (
    Disk("main"),
    Disk("spare"),
    Disk("spare2"),
    Disk("main4k", block=4096),
    Disk("spare4k", block=4096),
    Disk("scsi", interface="scsi"),
    Disk("nvme", interface="nvme"),
    Disk("ide", interface="ide"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the caller choose the guest."""
    parser.addoption(
        "--lab-image",
        default=os.environ.get("DM_REMAP_LAB_IMAGE", DEFAULT_IMAGE),
        help=f"guest image for the tests in VMs: debian-12 or debian-13 (default {DEFAULT_IMAGE})",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in this directory as one that needs a VM; those that install come last.

    What the role installs looks at each disk that changes, which costs the others' tests time.
    """
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vm)
    items.sort(key=lambda item: item.get_closest_marker("installs") is not None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed, because a run that takes long may be cut short."""
    if report.failed:
        print(f"\n{report.nodeid}: {report.when}\n{report.longreprtext}", flush=True)


@pytest.fixture(scope="session")
def lab_image(pytestconfig: pytest.Config) -> str:
    """The name of the guest image to test on."""
    name = pytestconfig.getoption("--lab-image", default=None)
    return str(name or os.environ.get("DM_REMAP_LAB_IMAGE", DEFAULT_IMAGE))


@pytest.fixture(scope="session")
def machine(lab_image: str) -> Iterator[Machine]:
    """The session's guest, with DISKS. Prefer ``lab``, which is clean."""
    with Machine(image=lab_image, disks=DISKS) as machine:
        yield machine


@pytest.fixture
def lab(machine: Machine) -> Iterator[Machine]:
    """The session's guest, clean: no faults, no dm devices, no mounts, zeroed disks.

    What a test leaves behind that cannot be cleaned up is that test's error, and the guest
    is booted again for the next one.
    """
    if not machine.running:
        machine.start()
    yield machine
    try:
        machine.reset(zero=[disk.name for disk in DISKS])
    except LabError:
        if machine.running:
            machine.power_cut()
        machine.reset(zero=[disk.name for disk in DISKS])
        raise
