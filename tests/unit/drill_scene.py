# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host with three targets on five spares, and what becomes of its disks, for the tests of
assembly."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dm_remap import assembly
from dm_remap.assembly import Report
from dm_remap.backups import Backups
from dm_remap.engine import Engine
from dm_remap.format import minimum_spare_sectors, slot_sectors_of
from dm_remap.order import Order
from dm_remap.planner import plan_present
from dm_remap.request import Request
from dm_remap.salvage import Patience
from tests.unit.fake_kernel import SECTOR, Disk, Kernel, Process

CHUNK = 8
CHUNKS = 90
# The last chunk has 5 sectors.
SECTORS = CHUNKS * CHUNK + 5
# Larger than the smallest, whose first chunks are under the far middle copy.
SPARE_SECTORS = minimum_spare_sectors(CHUNK, 1) + 8192
# The targets with their spares, and how many chunks are remapped.
TARGETS = {"alpha": (("s0", "s1"), 80), "beta": (("s2", "s3"), 70), "gamma": (("s4",), 50)}
STALE = b"\xee" * SECTOR
NEAR = slot_sectors_of(SPARE_SECTORS)[:5]


def data_of(name: str, sector: int) -> bytes:
    return f"{name} {sector:8} ".encode().ljust(SECTOR // 2, b"#") * 2


@dataclass
class Drill:
    """A host, with what its targets hold.

    Args:
        kernel: its kernel.
        folder: folder for its locks and backups.
        on: the serial number of the spare that each remapped chunk is on, by target and chunk.
    """

    kernel: Kernel
    folder: Path
    on: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def engine(self, process: Process | None = None) -> Engine:
        used = process or Process(self.kernel)
        return Engine(
            mapper=used.mapper,
            blocks=used.blocks,
            lock_dir=str(self.folder / "locks"),
            backup_dir=str(self.folder / "backup"),
        )

    def backups(self) -> Backups:
        return Backups(str(self.folder / "backup"))

    def disk(self, name: str) -> Disk:
        """A disk by what it was called at first."""
        return next(d for d in self.kernel.disks.values() if d.serial == f"serial-{name}")

    def assemble(
        self, order: Order | None = None, check: bool = False, process: Process | None = None
    ) -> Report:
        return assembly.assemble(self.engine(process), order or Order(), check)

    def results(self, order: Order | None = None, check: bool = False) -> dict[str, str]:
        return {t.target.name: t.result for t in self.assemble(order, check).targets}

    def without(self, *names: str) -> Drill:
        """The host with these disks detached."""
        for name in names:
            del self.kernel.disks[self.disk(name).path]
        return self

    def elsewhere(self, folder: Path, seed: int = 1) -> Drill:
        """Its disks at another host, which knows nothing, under other names in another order."""
        kernel = Kernel()
        disks = [disk.clone() for disk in self.kernel.disks.values()]
        random.Random(seed).shuffle(disks)
        for number, disk in enumerate(disks):
            disk.lose_power(disk.cache)
            disk.path, disk.devno = f"/dev/moved{number}", f"259:{number}"
            kernel.disks[disk.path] = disk
        return Drill(kernel, folder, self.on)

    def read(self, name: str, sector: int) -> bytes | None:
        try:
            return self.kernel.read(self.kernel.mapped[name].devno, sector, 1)
        except OSError:
            return None

    def check(self, missing: Collection[str] = (), names: Collection[str] = tuple(TARGETS)) -> None:
        """Every sector reads its data, or an error if its spare is missing."""
        gone = {f"serial-{name}" for name in missing}
        for name in names:
            for sector in range(SECTORS):
                away = self.on[name].get(sector // CHUNK) in gone
                wanted = None if away else data_of(name, sector)
                assert self.read(name, sector) == wanted, (name, sector)


def make_drill(folder: Path) -> Drill:
    """Host A: 200 remapped chunks, and old data on the mains in their places."""
    drill = Drill(Kernel(), folder)
    for name, (spares, _count) in TARGETS.items():
        main = drill.kernel.add_disk(f"main-{name}", SECTORS)
        main.fill(0, b"".join(data_of(name, sector) for sector in range(SECTORS)))
        for spare in spares:
            drill.kernel.add_disk(spare, SPARE_SECTORS)
    # Disks of the same sizes that have nothing to do with it.
    drill.kernel.add_disk("blank", SPARE_SECTORS)
    drill.kernel.add_disk("other", SECTORS).fill(0, b"x" * SECTOR * 8)
    on = {}
    for name, (spares, count) in TARGETS.items():
        on[name] = _create(drill, name, spares, count)
    return replace(drill, on=on)


def _create(drill: Drill, name: str, spares: Collection[str], count: int) -> dict[int, str]:
    engine = drill.engine()
    paths = tuple(f"/dev/{spare}" for spare in spares)
    request = Request(
        name,
        f"/dev/main-{name}",
        paths,
        chunk_bytes=CHUNK * SECTOR,
        on_error="fail",
        allocation="balanced",
    )
    engine.apply(plan_present(request, engine.see(name, request.main, paths)))
    chunks = sorted(random.Random(name).sample(range(CHUNKS + 1), count))
    engine.remap(name, [(chunk * CHUNK, 1) for chunk in chunks], patience=Patience(backoff=0))
    main = drill.kernel.disks[request.main]
    for chunk in chunks:
        main.fill(chunk * CHUNK, STALE * min(CHUNK, SECTORS - chunk * CHUNK))
    drill.kernel.flush(drill.kernel.mapped[name].devno)
    metadata = engine.require(name).metadata
    where = {
        extent.logical + step: extent.spare
        for extent in metadata.extents
        for step in range(extent.length)
    }
    assert sorted(where) == chunks
    return {chunk: f"serial-{list(spares)[index]}" for chunk, index in where.items()}


def overwrite(disk: Disk, indexes: Collection[int]) -> None:
    """Overwrite the near copies of these numbers."""
    for index in indexes:
        disk.fill(NEAR[index], b"\xa5" * (1 << 13))


def zero(disk: Disk, sectors: int) -> None:
    """Zero the first sectors of a disk."""
    for where in (disk.content, disk.stable):
        for sector in [sector for sector in where if sector < sectors]:
            del where[sector]
