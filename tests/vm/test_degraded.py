# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A target without one of its spares, in a guest with the healer, and the spare's return."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab import Disk
from tests.vm.test_healer import FILLED, Guest, guest, installed

pytestmark = pytest.mark.installs

__all__ = ["guest", "installed"]

# Makes or activates a target that holds its errors, as the module `target` does.
PRESENT = """
import json, sys
sys.path.insert(0, "/usr/lib/dm-remap")
from dm_remap.engine import Engine
from dm_remap.errors import Refused
from dm_remap.planner import plan_present
from dm_remap.request import Request
name, degraded, main, *spares = sys.argv[1:]
engine = Engine()
engine.check_host()
with engine.locked_host(), engine.locked(name):
    request = Request(name, main, tuple(spares), on_error="hold", degraded=degraded == "degraded")
    try:
        plan = plan_present(request, engine.see(name, main, spares, request.degraded))
    except Refused as error:
        print(json.dumps(str(error)))
    else:
        engine.apply(plan)
        print(json.dumps([action.kind for action in plan.actions]))
"""

# Stops a target as the end of its host would, but in order.
STOP = """
systemctl stop dm-remap-healer
for turn in 1 2 3 4 5 6; do dmsetup remove_all 2>/dev/null; udevadm settle; done
systemctl start dm-remap-healer
ls /sys/block | grep -c ^dm- || true
"""


def test_a_missing_spare_takes_down_only_its_chunks_and_comes_back(
    guest: Guest,  # noqa: F811
    tmp_path: Path,
) -> None:
    lost, first = range(384, 640, 8), range(0, 384, 8)
    rest = range(640, FILLED, 8)
    for name in ("pull0", "pull1"):
        image = tmp_path / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        guest.lab.attach(Disk(name, size="64M", image=str(image)))
    guest.lab.write_file("/root/present.py", PRESENT)
    guest.lab.write_file("/root/stop.sh", STOP)
    guest.create("main", spares=("pull0", "pull1"))
    guest.script("remap", "384", "512")
    # From now on the main has old data there.
    assert set(guest.act(*[("direct durable write", at, 8, 1) for at in lost])) == {"ok"}
    assert guest.lab.run(["sh", "/root/stop.sh"], timeout=300).stdout.strip() == "0"
    guest.lab.detach("pull0")
    main, left = (guest.lab.disk(name).path for name in ("main", "pull1"))
    refusal = json.loads(guest.script("present", "whole", main, left))
    assert "spare 0" in refusal
    assert "with 2 remapped chunks" in refusal
    assert "degraded: true" in refusal
    done = json.loads(guest.script("present", "degraded", main, left))
    assert done[-2:] == ["note_missing", "create_target"]
    assert set(guest.scan(384, 256, 1).values()) == {"EIO"}
    assert len(guest.scan(384, 256, 1)) == len(lost)
    assert guest.do("direct write", 384, 8, 2) == "EIO"
    assert guest.scan(0, 8 * len(first)) == guest.scan(640, 8 * len(rest)) == {}
    # An error of main is healed as ever, on the other spare.
    guest.lab.disk("main").fail([(1288, 8)], op="write")
    assert guest.do("direct write", 1280, 64, 1) == "ok"
    assert guest.event("remapped")["suspect"] == [[1280, 128]]
    # The spare is plugged in again, while the target is in use.
    back = guest.lab.attach(Disk("pull0", size="64M", image=str(tmp_path / "pull0.img"))).path
    assert json.loads(guest.script("present", "whole", main, back, left)) == ["return_spare"]
    assert json.loads(guest.script("present", "whole", main, back, left)) == []
    assert guest.scan(384, 256, 1) == {}
    assert guest.scan(0, 384) == guest.scan(640, 640) == guest.scan(1280, 64, 1) == {}
    assert guest.act(("direct write", 384, 8, 2), ("direct read", 384, 8, 2)) == ["ok", "ok"]
    # The healer knows of it, and its next commit goes to both.
    guest.lab.disk("main").fail([(2568, 8)], op="write")
    assert guest.do("direct write", 2560, 64, 1) == "ok"
    assert guest.scan(392, 248, 1) == guest.scan(2560, 64, 1) == {}
    assert json.loads(guest.script("present", "whole", main, back, left)) == []
