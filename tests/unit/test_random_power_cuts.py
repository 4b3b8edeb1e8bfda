# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Power cuts at random moments of whole remaps, under an application at work.

Each history is made from its seed: spares, block size, bad and weak sectors, what the application
does between any two calls of the engine, when the power goes, and which logical blocks of the
unflushed writes are on the medium then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dm_remap.format import Metadata
from tests.unit.fake_kernel import SECTOR, Kernel, Process, Volatile
from tests.unit.test_engine import CHUNK, NAME, App, make_scene

# A weak sector fails at most so often, which may be more than the salvage tries it.
WEAKEST = 9
# A cut at every so many of the moments, in the mean.
MOMENTS_A_CUT = 25


@dataclass
class BusyApp(App):
    """An application that also reads, and whose flushes take as long as they take.

    ``fragile`` are the blocks that may be lost as long as nothing was written there.
    """

    fragile: set[int] = field(default_factory=set)
    flushes: dict[int, dict[int, int]] = field(default_factory=dict)
    reads: dict[int, tuple[int, int]] = field(default_factory=dict)

    def settle(self, kernel: Kernel) -> None:
        super().settle(kernel)
        for number in [number for number in self.flushes if number in kernel.completed]:
            for sector, version in self.flushes.pop(number).items():
                self.durable[sector] = max(version, self.durable.get(sector, 0))
        for number in [n for n in self.reads if n in kernel.completed | kernel.failed]:
            sector, oldest = self.reads.pop(number)
            seen = kernel.answers.get(number)
            may_fail = sector in self.fragile and oldest == 0
            assert seen in self.versions[sector][oldest:] or (seen is None and may_fail), sector

    def flush(self, kernel: Kernel) -> None:
        """Whatever was acknowledged before is durable once this has come back."""
        self.settle(kernel)
        self.flushes[kernel.submit_flush(NAME)] = dict(self.acknowledged)
        self.settle(kernel)

    def read(self, kernel: Kernel, sector: int) -> None:
        """A read gives at least what was acknowledged before it began."""
        self.settle(kernel)
        sector -= sector % self.block
        oldest = self.acknowledged.get(sector, 0)
        self.reads[kernel.submit_read(NAME, sector, self.block)] = (sector, oldest)
        self.settle(kernel)

    def allowed(self, sector: int, power_cut: bool) -> list[bytes | None]:
        known = self.durable if power_cut else self.acknowledged
        may_fail = sector in self.fragile and known.get(sector, 0) == 0
        return super().allowed(sector, power_cut) + ([None] if may_fail else [])

    def start_again(self, found: dict[int, bytes | None]) -> None:
        """After a reboot, what is found is what counts."""
        self.versions = {sector: [data] for sector, data in found.items()}
        for known in (self.acknowledged, self.durable, self.waiting, self.flushes, self.reads):
            known.clear()


@dataclass
class Cut:
    """A host at the moment when its power goes."""

    kernel: Kernel
    app: BusyApp
    label: str


class History:
    """A host whose life is drawn from ``chance``."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.chance = chance
        block = chance.choice((1, 1, 8))
        # A lazy application leaves work to the engine that its own flushes would have done.
        self.diligence = chance.choice((0.001, 0.1, 1.0))
        self.scene = make_scene(folder, chance.randint(1, 3), block)
        self.app = BusyApp(block, self.scene.app.versions)
        self.scene = self.scene.at(self.scene.kernel, self.app)
        self.scene.create()

    def spoil(self) -> list[tuple[int, int]]:
        """Make sectors bad for ever or for some reads; the ranges to remap for it."""
        scene, block, ranges = self.scene, self.app.block, []
        mapped = {
            extent.logical + number
            for extent in self.metadata().extents
            for number in range(extent.length)
        }
        free = [c for c in range(-(-scene.main.sectors // CHUNK)) if c not in mapped]
        for chunk in self.chance.sample(free, self.chance.randint(1, 3)):
            places = range(chunk * CHUNK, min((chunk + 1) * CHUNK, scene.main.sectors))
            blocks = places[::block]
            for start in self.chance.sample(blocks, min(len(blocks), self.chance.randint(0, 3))):
                sector = start + self.chance.randrange(block)
                if scene.main.bad.keys() & set(range(start, start + block)):
                    continue
                if self.chance.random() < 0.5:
                    scene.main.spoil([sector])
                    self.app.versions[start] = [None]
                    self.app.acknowledged.pop(start, None)
                    self.app.durable.pop(start, None)
                else:
                    failures = self.chance.randint(1, WEAKEST)
                    scene.main.spoil([sector], failures)
                    self.app.fragile.add(start)
            ranges.append((self.chance.choice(blocks), block))
        return ranges

    def metadata(self) -> Metadata:
        return self.scene.engine().require(NAME).metadata

    def remap(self, ranges: list[tuple[int, int]]) -> list[Cut]:
        """Remap under the application; some of the moments at which the power may go."""
        scene, app, chance = self.scene, self.app, self.chance
        cuts: list[Cut] = []
        near = [start - start % CHUNK + offset for start, _count in ranges for offset in range(8)]
        near = [sector for sector in near if sector < scene.main.sectors]

        def moment(label: str) -> None:
            if chance.random() * MOMENTS_A_CUT < 1:
                cuts.append(Cut(scene.kernel.clone(), app.clone(), f"before {label}"))
            what = chance.random() / self.diligence
            anywhere = chance.randrange(scene.main.sectors)
            sector = chance.choice(near) if chance.random() < 0.8 else anywhere
            if what < 0.3:
                app.write(scene.kernel, sector)
            elif what < 0.45:
                app.read(scene.kernel, sector)
            elif what < 0.55:
                app.flush(scene.kernel)

        def on_read(sector: int, _count: int) -> None:
            scene.main.on_read = None
            moment(f"read of main at {sector}")
            scene.main.on_read = on_read

        scene.main.on_read = on_read
        engine = scene.engine(Process(scene.kernel, moment), lambda name: moment(f"after {name}"))
        scene.remap(*ranges, engine=engine)
        scene.main.on_read = None
        cuts.append(Cut(scene.kernel.clone(), app.clone(), "end"))
        return cuts

    def survivors(self, writes: list[Volatile]) -> list[Volatile]:
        """Some of the blocks that were written since the last flush."""
        pieces = [piece for item in writes for piece in blocks_of(item, self.app.block)]
        share = self.chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        kept = [piece for piece in pieces if self.chance.random() < share]
        return self.chance.choice((kept, writes[: len(writes) // 2], writes[len(writes) // 2 :]))

    def reboot(self, cut: Cut) -> None:
        """Cut the power at a moment, and make the target present again."""
        cut.kernel.cut_power(self.survivors(cut.kernel.volatile()))
        self.app = cut.app
        self.app.waiting.clear()
        self.app.flushes.clear()
        self.app.reads.clear()
        self.scene = self.scene.at(cut.kernel, cut.app)
        self.scene.create()
        self.scene.check(power_cut=True, why=cut.label)

    def read(self, sector: int) -> bytes | None:
        """Read so often that a weak sector that is still on main answers."""
        answers = (self.scene.read(sector) for _turn in range(WEAKEST * self.app.block + 1))
        return next((data for data in answers if data is not None), None)

    def heal(self, metadata: Metadata) -> None:
        """A write to a lost sector heals it, and only it."""
        block = self.app.block
        found = {s: self.read(s) for s in range(0, self.scene.main.sectors, block)}
        for lost in metadata.lost:
            for sector in range(lost.sector, lost.sector + lost.count, block):
                self.app.write(self.scene.kernel, sector)
                found[sector] = self.app.versions[sector][-1]
        self.app.settle(self.scene.kernel)
        for sector, data in found.items():
            assert self.read(sector) == data, sector
        self.app.start_again(found)
        self.app.flush(self.scene.kernel)


def blocks_of(item: Volatile, block: int) -> list[Volatile]:
    """A write to a disk as single logical blocks, since any of them may be on the medium."""
    if isinstance(item.data, int):
        starts = range(0, item.data, block)
        return [Volatile(item.where, item.sector + n, min(block, item.data - n)) for n in starts]
    if not item.where.startswith("/"):
        return [item]
    size = block * SECTOR
    return [
        Volatile(item.where, item.sector + n // SECTOR, item.data[n : n + size])
        for n in range(0, len(item.data), size)
    ]


def live(folder: Path, seed: int) -> int:
    """Remap, cut the power at random moments, and go on from one of them; how many cuts."""
    chance = random.Random(seed)
    history = History(folder, chance)
    count = 0
    for _turn in range(2):
        before = history.metadata()
        cuts = history.remap(history.spoil())
        after = history.metadata()
        history.scene.check(why="without a cut")
        chance.shuffle(cuts)
        for cut in cuts:
            history.reboot(cut)
            found = history.metadata()
            assert found.digest in (before.digest, after.digest), cut.label
            history.heal(found)
            count += 1
    return count


def check(folder: Path, first_seed: int, cuts: int) -> None:
    count, seed = 0, first_seed
    while count < cuts:
        where = folder / str(seed)
        where.mkdir()
        try:
            count += live(where, seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        seed += 1


@pytest.mark.parametrize("part", range(4))
def test_the_power_goes_at_any_moment(tmp_path: Path, part: int) -> None:
    check(tmp_path, part * 1_000_000, 60)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_the_power_goes_thousands_of_times(tmp_path: Path, part: int) -> None:
    check(tmp_path, 100_000_000 + part * 1_000_000, 500)
