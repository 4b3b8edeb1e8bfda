# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A replacement in the metadata, in the map and in plans: which disk may be which, and who may."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import copies, extents, replacement
from dm_remap import format as fmt
from dm_remap.blockdev import DeviceInfo, Use
from dm_remap.errors import Refused
from dm_remap.format import Diagnosis, Extent, LostRange, Metadata
from dm_remap.mapping import build_table
from dm_remap.plan import Plan
from dm_remap.plan_removal import plan_absent
from dm_remap.plan_upkeep import plan_upkeep
from dm_remap.planner import plan_present
from dm_remap.replacing import progress_line
from dm_remap.request import Seen
from dm_remap.target import ActiveTarget, Candidate
from tests.unit.test_planner import (
    MAIN_SECTORS,
    NAME,
    REQUEST,
    active,
    blank,
    candidate,
    created,
    info,
    kinds,
    mapped,
    marked,
    seen_active,
)


def disk(path: str, number: int) -> DeviceInfo:
    devno = f"8:{number}"
    serial = f"serial-{number}"
    return replace(info("/dev/main"), path=path, devno=devno, disk=devno, serial=serial)


NEW = disk("/dev/new", 64)
OTHER = disk("/dev/other", 80)
TO_NEW = replace(REQUEST, main=NEW.path)
REMAPS = (Extent(3, 2, 0, 0), Extent(9, 1, 1, 4))


def half(
    metadata: Metadata | None = None,
    copied: int = 8,
    paths: tuple[str, str] = (NEW.path, "/dev/main"),
    **new: Any,
) -> Metadata:
    """A replacement under way."""
    known = metadata or created()
    config = replacement.begun(known.config, replace(NEW, **new), *paths)
    begun = known.successor(3, config=config)
    return replacement.advanced(begun, copied, ())


def under_way(metadata: Metadata | None = None) -> ActiveTarget:
    target = active(metadata or half())
    return replace(target, replacement=NEW, new_main=mapped(f"{NAME}-new", 7))


def seen_new(target: ActiveTarget, new: DeviceInfo = NEW, *signatures: str) -> Seen:
    content = Candidate(new, signatures, candidate("/dev/spare2").survey)
    return replace(seen_active(target), main=new, new_main=content)


# Metadata


def test_older_versions_refuse_a_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = fmt.pack_slot(half(), fmt.spare_uuid_of(half(), 0), 49152, 0)
    assert fmt.unpack_slot(raw, 0).metadata == half()
    monkeypatch.setattr(fmt, "KNOWN_FEATURES", 0)
    with pytest.raises(fmt.Invalid) as caught:
        fmt.unpack_slot(raw, 0)
    assert caught.value.diagnosis is Diagnosis.NEWER


def test_the_feature_goes_with_the_last_commit() -> None:
    assert created().features == 0
    assert half().features == fmt.FEATURE_REPLACEMENT
    for end in (replacement.finished, replacement.undone):
        ended = half().successor(4, config=end(half().config))
        assert ended.features == 0
        assert ended.body


def test_the_digest_tells_generations_with_and_without_the_feature_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = half().digest
    monkeypatch.setattr(fmt, "FEATURE_REPLACEMENT", 0)
    assert half().digest != digest


@pytest.mark.parametrize("copied", [-1, 22, True, "1", None])
def test_a_border_outside_the_target_is_no_metadata(copied: object) -> None:
    assert replacement.chunks_in_all(half()) == 21
    config = {**half().config, "replacement": {**half().config["replacement"], "copied": copied}}
    with pytest.raises(fmt.BadMetadata, match=r"replacement\.copied"):
        assert replace(half(), config=config).body


@pytest.mark.parametrize("value", [None, [], {"copied": 0}, {"copied": 0, "main": "disk"}])
def test_a_replacement_without_a_main_is_no_metadata(value: object) -> None:
    with pytest.raises(fmt.BadMetadata, match="new main"):
        assert replace(half(), config={**half().config, "replacement": value}).body


def test_the_last_commit_makes_the_new_main_the_main() -> None:
    config = replacement.finished(half().config)
    assert config["main"] == {**created().config["main"], "serial": NEW.serial}
    assert replacement.undone(half().config) == created().config


def test_a_larger_main_is_known_by_its_own_size() -> None:
    entry = replacement.finished(half(sectors=5000).config)["main"]
    assert (entry["sectors"], entry["device_sectors"]) == (MAIN_SECTORS, 5000)
    assert replacement.matches(replace(NEW, sectors=5000), entry)
    assert not replacement.matches(NEW, entry)


chunks = st.integers(0, 20)


@given(st.sets(chunks), st.sets(chunks), chunks)
def test_what_returns_to_a_main_is_lost_no_more(
    spared: set[int], returned: set[int], border: int
) -> None:
    placed = extents.merge(Extent(chunk, 1, 0, chunk) for chunk in spared)
    lost = tuple(LostRange(chunk * 128 + 5, 3) for chunk in spared)
    before = replace(half(), extents=placed, lost=lost)
    after = replacement.advanced(before, border, returned)
    left = {c for e in after.extents for c in range(e.logical, e.logical + e.length)}
    assert left == spared - returned
    assert {item.sector // 128 for item in after.lost} == spared - returned
    for chunk in left:
        extent = extents.find(after.extents, chunk)
        assert extent is not None
        assert extent.physical + chunk - extent.logical == chunk
    assert replacement.copied_chunks(after) == border


# The map


@given(st.sets(chunks, max_size=6), st.sets(chunks, max_size=6), st.integers(0, 21))
def test_each_sector_has_the_place_that_the_border_gives_it(
    spared: set[int], frozen: set[int], border: int
) -> None:
    placed = extents.merge(Extent(chunk, 1, 0, 40 + chunk) for chunk in spared)
    held = {chunk: position for position, chunk in enumerate(sorted(frozen))}
    table = build_table(
        MAIN_SECTORS, 128, "old", placed, {0: "spare"}, held, "frozen", border * 128, "new"
    )
    assert [s.start for s in table[1:]] == [s.start + s.length for s in table[:-1]]
    assert table[-1].start + table[-1].length == MAIN_SECTORS
    for sector in range(0, MAIN_SECTORS, 8):
        (segment,) = [s for s in table if s.start <= sector < s.start + s.length]
        device, offset = segment.params.split()
        chunk = sector // 128
        found = device, int(offset) + sector - segment.start
        if chunk in frozen:
            assert found == ("frozen", held[chunk] * 128 + sector % 128)
        elif chunk in spared:
            assert found == ("spare", (40 + chunk) * 128 + sector % 128)
        else:
            assert found == ("new" if chunk < border else "old", sector)


# Plans for an active target


def test_another_main_replaces_the_main() -> None:
    target = active(created(*REMAPS, lost=(LostRange(9 * 128, 8),)))
    plan = plan_present(TO_NEW, seen_new(target))
    (action,) = plan.actions
    assert (action.kind, action.device) == ("replace_main", NAME)
    assert action.details == {
        "from": "/dev/main",
        "to": "/dev/new",
        "copied": 0,
        "total": MAIN_SECTORS * 512,
    }
    assert plan.replacement == NEW
    assert plan.after["config"]["main"]["serial"] == NEW.serial
    assert plan.after["table"] == [
        "0 1152 linear main 0",
        "1152 128 linear spare1 512",
        f"1280 {MAIN_SECTORS - 1280} linear main 1280",
    ]


def test_a_replacement_goes_on_and_back() -> None:
    seen = seen_active(under_way())
    forth = plan_present(TO_NEW, replace(seen, main=NEW))
    assert kinds(forth) == ["replace_main"]
    assert forth.actions[0].details["copied"] == 8 * 65536
    back = plan_present(REQUEST, seen)
    assert kinds(back) == ["undo_replacement"]
    assert back.after["config"]["main"] == back.before["config"]["main"]
    assert plan_upkeep(under_way()).actions == ()


def test_a_third_disk_is_refused_while_a_replacement_is_under_way() -> None:
    with pytest.raises(Refused, match="is being replaced by /dev/new") as caught:
        plan_present(replace(REQUEST, main=OTHER.path), seen_new(under_way(), OTHER))
    assert caught.value.remedy == "give /dev/new to go on, or /dev/main to go back"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sectors": MAIN_SECTORS - 1}, "fewer than the target's"),
        ({"logical_block": 4096}, "logical blocks of 4096"),
        ({"physical_block": 131072}, "physical blocks of 131072"),
        ({"disk": "8:0"}, "on the same disk as the main"),
        ({"read_only": True}, "is read-only"),
        ({"used_by": (Use("new", "mounted on", "/mnt"),)}, "is in use"),
        ({"devno": "8:16", "disk": "8:16"}, "is the main itself"),
    ],
)
def test_disks_that_cannot_replace_the_main(changes: dict[str, Any], message: str) -> None:
    new = replace(NEW, **changes)
    with pytest.raises(Refused, match=message) as caught:
        plan_present(TO_NEW, seen_new(active(), new))
    assert caught.value.device in (new.path, "/dev/spare0")
    plan_present(TO_NEW, seen_new(active(), replace(NEW, sectors=MAIN_SECTORS + 1)))


def test_another_path_to_the_same_disk_is_refused() -> None:
    target = active()
    assert target.main is not None
    target = replace(target, main=replace(target.main, wwn="0x5000"))
    with pytest.raises(Refused, match="another path to the same disk"):
        plan_present(TO_NEW, seen_new(target, replace(NEW, wwn="0x5000")))


def test_what_is_on_a_new_main_is_erased_only_on_request() -> None:
    seen = seen_new(active(), NEW, "ext4")
    with pytest.raises(Refused, match="not empty: ext4"):
        plan_present(TO_NEW, seen)
    plan = plan_present(replace(TO_NEW, wipe=True), seen)
    assert kinds(plan) == ["wipe_main", "replace_main"]
    assert plan.actions[0].details == {"content": ["ext4"]}


@pytest.mark.parametrize("discard", [False, True])
def test_a_spare_with_remaps_is_erased_only_on_a_special_request(discard: bool) -> None:
    used = marked(created(*REMAPS)).candidates[0]
    seen = replace(seen_new(active()), new_main=replace(used, info=NEW))
    request = replace(TO_NEW, wipe=True, discard_remaps=discard)
    if discard:
        assert kinds(plan_present(request, seen)) == ["wipe_main", "replace_main"]
    else:
        with pytest.raises(Refused, match="with remapped chunks"):
            plan_present(request, seen)


@pytest.mark.parametrize("is_active", [True, False])
def test_a_target_between_two_disks_is_not_removed(is_active: bool) -> None:
    target = under_way() if is_active else None
    seen = seen_active(under_way()) if is_active else marked(half())
    with pytest.raises(Refused, match="data on two disks"):
        plan_absent(NAME, target, seen)
    assert kinds(plan_absent(NAME, target, seen, discard_remaps=True))


# Plans for an inactive target


def asleep(main: DeviceInfo, *others: DeviceInfo, metadata: Metadata | None = None) -> Plan:
    seen = replace(marked(metadata or half()), main=main, others=others)
    return plan_present(replace(REQUEST, main=main.path), seen)


OLD = info("/dev/main")
BARE = {"serial": "", "wwn": "", "model": ""}


@pytest.mark.parametrize("named_new", [True, False])
def test_the_other_main_is_found_by_what_it_is(named_new: bool) -> None:
    """Both may have other paths than before."""
    old, new = replace(OLD, path="/dev/sdx"), replace(NEW, path="/dev/sdy")
    first, second = (new, old) if named_new else (old, new)
    plan = asleep(first, OLD, second, OTHER)
    assert (plan.main, plan.replacement) in [(old, new), (OLD, new)]
    assert kinds(plan)[-2:] == [
        "create_target",
        "replace_main" if named_new else "undo_replacement",
    ]
    assert plan.actions[-2].details["new_main"] == "/dev/sdy"


@pytest.mark.parametrize("named_new", [True, False])
def test_without_the_other_main_nothing_is_activated(named_new: bool) -> None:
    with pytest.raises(Refused, match="is not there"):
        asleep(NEW if named_new else OLD, OTHER)


def test_a_clone_of_the_other_main_is_not_chosen() -> None:
    clone = replace(OLD, path="/dev/clone", devno="8:96")
    with pytest.raises(Refused, match="could both be the old main"):
        asleep(NEW, OLD, clone)


@pytest.mark.parametrize("lasting", [True, False])
def test_disks_without_names_are_told_apart_by_their_paths(lasting: bool) -> None:
    """But not by paths that another disk may have after a restart."""
    folder = "/dev/disk/by-path" if lasting else "/dev"
    config = created().config
    known = replace(created(), config={**config, "main": {**config["main"], **BARE}})
    old = replace(OLD, path=f"{folder}/old", **BARE)
    new = replace(NEW, path=f"{folder}/new", **BARE)
    metadata = half(known, paths=(new.path, old.path), **BARE)
    other = replace(new, path=f"{folder}/other", devno="8:112")
    for first, second in [(new, old), (old, new)]:
        if lasting:
            plan = asleep(first, second, other, metadata=metadata)
            assert (plan.main, plan.replacement) == (old, new)
        with pytest.raises(Refused, match="is not there" if lasting else "neither surely"):
            asleep(first, other, metadata=metadata)
    with pytest.raises(Refused, match="neither surely"):
        asleep(other, old, new, metadata=metadata)


def test_a_disk_with_a_name_needs_no_lasting_path() -> None:
    config = created().config
    known = replace(created(), config={**config, "main": {**config["main"], **BARE}})
    bare = replace(OLD, **BARE)
    with pytest.raises(Refused, match="is not there"):
        asleep(NEW, bare, metadata=half(known))
    plan = asleep(OLD, NEW, metadata=half())
    assert plan.replacement == NEW


def test_another_disk_is_neither_main() -> None:
    with pytest.raises(Refused, match="neither surely"):
        asleep(OTHER, OLD, NEW)


def test_a_main_of_a_replacement_in_use_elsewhere_is_refused() -> None:
    used = replace(OLD, used_by=(Use("main", "mounted on", "/mnt"),))
    with pytest.raises(Refused, match="is in use"):
        asleep(NEW, used)


def test_blank_devices_are_no_replacement() -> None:
    assert kinds(plan_present(REQUEST, blank()))[-1] == "create_target"
    assert copies.choose({"a": marked(half()).candidates[0].survey}).metadata == half()


# Progress


def test_progress_tells_what_is_left() -> None:
    line = progress_line(250_000_000, 1_000_000_000, 125_000_000, 5.0)
    assert line == "copied 250000000 of 1000000000 bytes, 25.0 %, 25.0 MB/s, 30 s left"
    assert "time left unknown" in progress_line(0, 10, 0, 0.0)
