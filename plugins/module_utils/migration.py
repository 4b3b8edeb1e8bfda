# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a dm-remap-v4 spare to a target of ours: where each sector is to come from (pure).

The configuration of a target that was migrated has the key ``migration``::

    verified  whether all migrated sectors were compared with what they came from
    sequence  that of the old metadata

Until it is verified the target was never active, so that everything on its spares is a copy of what
main and the old spare have, and the migration can begin anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import Refused, count_of
from .extents import chunks_of, merge_sectors
from .format import Metadata
from .kernel_v4 import METADATA_SECTORS, KernelMetadata, Remap

SECTOR_BYTES = 512
# What may be done with entries of which nobody knows whether the old target used them.
FROM_MAIN, FROM_SPARE, AS_LOST = "main", "spare", "lost"
PENDING_CHOICES = (FROM_MAIN, FROM_SPARE, AS_LOST)
_SHOWN = 8
# Most filesystems read and write at least so much at once.
_USUAL_UNIT = 8


def unfinished(metadata: Metadata) -> bool:
    """Whether the target is one whose migration has not ended, so that it was never active."""
    return "migration" in metadata.config and not migrated(metadata)


def migrated(metadata: Metadata) -> bool:
    """Whether the target was migrated from a kernel target, and that has ended."""
    return _entry(metadata.config).get("verified") is True


def begun(config: Mapping[str, Any], old: KernelMetadata) -> dict[str, Any]:
    """The configuration of a target whose migration begins."""
    return {**config, "migration": {"verified": False, "sequence": old.sequence}}


def verified(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration when all was compared."""
    return {**config, "migration": {**_entry(config), "verified": True}}


def _entry(config: Mapping[str, Any]) -> Mapping[str, Any]:
    entry = config.get("migration")
    return entry if isinstance(entry, dict) else {}


@dataclass(frozen=True)
class Lost:
    """Sectors of the target that have no trustworthy place, and why.

    Args:
        sector: first sector on the target.
        count: how many.
        reason: why, as the end of a sentence about them.
    """

    sector: int
    count: int
    reason: str


@dataclass(frozen=True)
class Piece:
    """Consecutive sectors of a chunk that come from one place.

    Args:
        sector: first sector on the target.
        count: how many.
        source: first sector on the old spare; None where main has them.
        lost: whether they come from nowhere.
    """

    sector: int
    count: int
    source: int | None = None
    lost: bool = False


@dataclass(frozen=True)
class Migration:
    """Where the sectors come from that are not simply on main.

    Args:
        places: for each such sector of the target, in whole blocks, its sector on the old spare.
        lost: sectors that come from nowhere.
        total: sectors of the target.
        warnings: what the user should know.
    """

    places: Mapping[int, int]
    lost: tuple[Lost, ...]
    total: int
    warnings: tuple[str, ...] = ()

    def chunks(self, chunk_sectors: int) -> list[int]:
        """The chunks that must not stay on main, ascending."""
        ranges = [(sector, 1) for sector in self.places]
        ranges += [(item.sector, item.count) for item in self.lost]
        return chunks_of(ranges, chunk_sectors, self.total)

    @cached_property
    def _lost_sectors(self) -> frozenset[int]:
        return frozenset(
            sector for item in self.lost for sector in range(item.sector, item.sector + item.count)
        )

    def pieces(self, start: int, count: int) -> list[Piece]:
        """What the sectors from ``start`` on are made of, in their order."""
        found: list[Piece] = []
        for sector in range(start, start + count):
            piece = Piece(sector, 1, self.places.get(sector), sector in self._lost_sectors)
            if found and _continues(found[-1], piece):
                last = found[-1]
                found[-1] = Piece(last.sector, last.count + 1, last.source, last.lost)
            else:
                found.append(piece)
        return found


def _continues(last: Piece, piece: Piece) -> bool:
    if last.lost or piece.lost:
        return last.lost == piece.lost
    if last.source is None or piece.source is None:
        return last.source is piece.source
    return last.source + last.count == piece.source


def resolve(
    old: KernelMetadata,
    name: str,
    block_sectors: int,
    unit_sectors: int | None = None,
    pending: str | None = None,
) -> Migration:
    """Decide where each sector of the new target comes from.

    An entry stands for the block that begins at its sector, or for ``unit_sectors`` where
    applications used larger ones: the old target sends I/O that begins at an entry's sector to the
    spare as a whole.

    - An entry that may never have been used is refused, unless ``pending`` says what to do.
    - Of several entries for one sector of main the last counts, as in the old target's own lookup;
      where some were used for sure and others maybe not, the sector is lost.
    - A place that two sectors share, that lies in the old metadata's own sectors, or that the spare
      does not have, is no place: what should be there is lost.
    - An entry for a sector that main does not have was never used.

    Args:
        old: the old target's metadata.
        name: path of the old spare, for messages.
        block_sectors: sectors in a logical block of main.
        unit_sectors: sectors of the unit in which main was used, a multiple of ``block_sectors``;
            None takes one block.
        pending: one of `PENDING_CHOICES`, or None.

    Raises:
        Refused: it cannot be decided without more being said.
    """
    unit = unit_sectors or block_sectors
    if unit % block_sectors or pending not in (None, *PENDING_CHOICES):
        raise Refused(
            f"a unit of {unit * SECTOR_BYTES} bytes and {pending!r} for remaps that may never have "
            "been used are not possible",
            device=name,
            remedy=f"give a multiple of {block_sectors * SECTOR_BYTES} bytes, and one of "
            + ", ".join(PENDING_CHOICES),
        )
    entries, given_up, mixed, warnings = _counting(old, name, unit, block_sectors)
    doubtful = [entry for entry in entries if entry.pending and entry.main_sector not in mixed]
    if doubtful and pending is None:
        raise Refused(
            f"{_entries(len(doubtful))} of its table may never have been used by the kernel target "
            f"(sectors {_shown([e.main_sector for e in doubtful])} of main), so nobody knows "
            "whether main or the old spare has the newer data",
            device=name,
            remedy=f"give migrate_pending: {FROM_SPARE} if the kernel target was started again "
            f"after these remaps were made, {FROM_MAIN} if not, or {AS_LOST} to make them lost "
            "sectors",
        )
    places, why = _placed(entries, old, unit, block_sectors, mixed, pending)
    claims = Counter(place for place, _sector in given_up.union(map(_swapped, places.items())))
    for sector, place in places.items():
        if claims[place] > 1:
            why.setdefault(sector, "shares its sector of the old spare with another one")
    # A block is the least that can be lost or read.
    for sector in list(why):
        first = sector - sector % block_sectors
        for other in range(first, min(first + block_sectors, old.main_sectors)):
            why.setdefault(other, why[sector])
    kept = {sector: place for sector, place in places.items() if sector not in why}
    if doubtful:
        fate = "lost" if pending == AS_LOST else f"taken from {pending}"
        warnings.append(
            f"{name}: {_entries(len(doubtful))} of the old table may never have been used; what is "
            f"at their sectors is {fate}"
        )
    if why:
        warnings.append(
            f"{name}: {count_of(len(why), 'sector')} of main cannot be saved (from "
            f"{_shown(sorted(why))} on) and will give errors until written; main itself still has "
            "what was there before they were remapped"
        )
    if kept:
        warnings.append(
            f"{name}: the kernel target sent I/O that began at a remapped sector to the spare as a "
            f"whole; {unit * SECTOR_BYTES} bytes of each remap are taken from there, so check the "
            "filesystem before it is used"
        )
        close = _close(kept, unit)
        if close:
            warnings.append(
                f"{name}: the places of sectors {_shown(close)} are so near to the one before them "
                "that I/O of more than one block may have been written over them"
            )
    return Migration(kept, _lost(why), old.main_sectors, tuple(warnings))


def _placed(
    entries: Sequence[Remap],
    old: KernelMetadata,
    unit: int,
    block_sectors: int,
    mixed: set[int],
    pending: str | None,
) -> tuple[dict[int, int], dict[int, str]]:
    """The place of each sector on the old spare, and why some have none."""
    places: dict[int, int] = {}
    why: dict[int, str] = {}
    for entry in entries:
        treated = FROM_SPARE if not entry.pending else pending
        if entry.main_sector not in mixed and treated == FROM_MAIN:
            continue
        for offset in range(min(unit, old.main_sectors - entry.main_sector)):
            sector = entry.main_sector + offset
            places[sector] = entry.spare_sector + offset
            if entry.main_sector in mixed:
                why[sector] = "has several remaps, of which some may never have been used"
            elif treated == AS_LOST:
                why[sector] = "has a remap that may never have been used"
            elif reason := _no_place(entry, old, unit, block_sectors, offset):
                why[sector] = reason
    return places, why


def _swapped(pair: tuple[int, int]) -> tuple[int, int]:
    return pair[1], pair[0]


def _close(places: Mapping[int, int], unit: int) -> list[int]:
    """Sectors whose places on the old spare follow another one's too closely for larger I/O."""
    found = []
    ordered = sorted(map(_swapped, places.items()))
    for (place, sector), (following, other) in zip(ordered, ordered[1:]):
        apart = following - place
        if unit < _USUAL_UNIT and apart < _USUAL_UNIT and other - sector != apart:
            found.append(other)
    return sorted(found)


def _counting(
    old: KernelMetadata, name: str, unit: int, block: int
) -> tuple[list[Remap], set[tuple[int, int]], set[int], list[str]]:
    """The entries that count, and what the others tell.

    Returns:
        Entries; (place, sector) of those that do not count and may have been used; sectors with
        contradictory entries; warnings.
    """
    warnings: list[str] = []
    latest: dict[int, Remap] = {}
    mixed: set[int] = set()
    given_up: set[tuple[int, int]] = set()
    outside: list[int] = []
    between: list[int] = []
    repeated: list[int] = []
    for entry in old.remaps:
        sector = entry.main_sector
        if sector >= old.main_sectors:
            outside.append(sector)
            continue
        if sector % unit:
            if unit != block:
                raise Refused(
                    f"has a remap of sector {sector}, where no unit of {unit * SECTOR_BYTES} bytes "
                    "begins",
                    device=name,
                    remedy="give a smaller migrate_unit, or none",
                )
            between.append(sector)
            continue
        before = latest.get(sector)
        if before and before.spare_sector != entry.spare_sector:
            repeated.append(sector)
            if before.pending != entry.pending:
                mixed.add(sector)
            if not before.pending:
                given_up |= {(before.spare_sector + i, sector + i) for i in range(unit)}
        elif before and not before.pending:
            # It was used for sure, whatever is said of it once more.
            continue
        latest[sector] = entry
    for sectors, why in (
        (outside, "which main does not have; they were never used"),
        (between, "where no block of main begins; they were never used"),
        (repeated, "each of which has several; the last one counts"),
    ):
        if sectors:
            warnings.append(f"{name}: the old table has remaps of sectors {_shown(sectors)}, {why}")
    return list(latest.values()), given_up, mixed, warnings


def _no_place(entry: Remap, old: KernelMetadata, unit: int, block: int, offset: int) -> str:
    """Why a sector's place on the old spare cannot have its data; empty if it can."""
    if entry.spare_sector + unit > old.spare_sectors:
        return "was remapped to beyond the end of the old spare"
    if entry.spare_sector % block:
        return "was remapped to where no block of the old spare begins"
    if entry.spare_sector + offset < METADATA_SECTORS:
        return "was remapped into the old metadata, which was written over it"
    return ""


def _lost(why: Mapping[int, str]) -> tuple[Lost, ...]:
    by_reason: dict[str, list[tuple[int, int]]] = {}
    for sector, reason in why.items():
        by_reason.setdefault(reason, []).append((sector, 1))
    found = [
        Lost(sector, count, reason)
        for reason, ranges in by_reason.items()
        for sector, count in merge_sectors(ranges)
    ]
    return tuple(sorted(found, key=lambda item: item.sector))


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def _shown(sectors: Sequence[int]) -> str:
    text = ", ".join(map(str, sectors[:_SHOWN]))
    more = len(sectors) - _SHOWN
    return f"{text} and {more} more" if more > 0 else text
