# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What several tests of the core share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from dm_remap import blockdev, memory
from tests.unit.drill_scene import Drill, make_drill


@pytest.fixture(scope="session", autouse=True)
def stay_ordinary() -> Iterator[None]:
    """Do not lock the memory of the process that runs the tests, nor change its priority."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "lock_memory", lambda: None)
        patch.setattr(blockdev, "idle_priority", contextlib.nullcontext)
        yield


@pytest.fixture(scope="module")
def host_a(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """The drill's targets on the host that made them."""
    return make_drill(tmp_path_factory.mktemp("host_a"))
