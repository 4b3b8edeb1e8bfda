# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans: what is refused and why, what is planned in which order, and when nothing is."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dm_remap import copies
from dm_remap.blockdev import OWN_SIGNATURE, DeviceInfo, Use
from dm_remap.copies import FailedCopy, NewerFormat, Survey
from dm_remap.devmapper import MappedDevice, Segment
from dm_remap.errors import DmRemapError, Refused, StaleGeneration
from dm_remap.extents import merge
from dm_remap.format import (
    Diagnosis,
    Extent,
    LostRange,
    Metadata,
    geometry_of,
    minimum_spare_sectors,
)
from dm_remap.plan import Action, Plan
from dm_remap.plan_remap import plan_remap
from dm_remap.plan_removal import plan_absent
from dm_remap.plan_upkeep import plan_upkeep
from dm_remap.planner import plan_present
from dm_remap.request import Request, Seen
from dm_remap.stack import PathState
from dm_remap.target import ActiveSpare, ActiveTarget, Candidate
from tests.unit.fake_kernel import Kernel, Process

NAME = "data"
CHUNK = 128
MAIN_SECTORS = 20 * CHUNK + 40
SPARE_SECTORS = minimum_spare_sectors(CHUNK, 1) + 8192
REQUEST = Request(NAME, "/dev/main", ("/dev/spare0", "/dev/spare1"), on_error="fail")


def info(path: str, **changes: Any) -> DeviceInfo:
    number = {"/dev/main": 0, "/dev/spare0": 16, "/dev/spare1": 32, "/dev/spare2": 48}[path]
    given = DeviceInfo(
        path=path,
        devno=f"8:{number}",
        sectors=MAIN_SECTORS if number == 0 else SPARE_SECTORS,
        logical_block=512,
        physical_block=512,
        disk=f"8:{number}",
        start=0,
        serial=f"serial-{number}",
        wwn="",
        model="Model",
        read_only=False,
        used_by=(),
    )
    return replace(given, **changes)


def survey_of(metadata: Metadata | None, index: int = 0, sectors: int = SPARE_SECTORS) -> Survey:
    """What a spare shows that carries this generation, or nothing."""
    kernel = Kernel()
    path = kernel.add_disk("spare", sectors).path
    with Process(kernel).blocks.BlockDevice(path, writable=True) as device:
        if metadata:
            copies.commit({index: device}, None, metadata)
        return copies.survey(device)


def candidate(
    path: str, metadata: Metadata | None = None, index: int = 0, **more: Any
) -> Candidate:
    return Candidate(info(path, **more), (), survey_of(metadata, index))


def blank() -> Seen:
    candidates = tuple(candidate(path) for path in REQUEST.spares)
    return Seen(target=None, remains=(), main=info("/dev/main"), candidates=candidates)


def with_spare(seen: Seen, position: int, **changes: Any) -> Seen:
    """The same with another candidate; fields of its device are prefixed with ``info_``."""
    old = seen.candidates[position]
    device = {key[5:]: value for key, value in changes.items() if key.startswith("info_")}
    rest = {key: value for key, value in changes.items() if not key.startswith("info_")}
    new = replace(old, info=replace(old.info, **device), **rest)
    both = [new if number == position else c for number, c in enumerate(seen.candidates)]
    return replace(seen, candidates=tuple(both))


def with_main(seen: Seen, **changes: Any) -> Seen:
    assert seen.main is not None
    return replace(seen, main=replace(seen.main, **changes))


def numbered_uuids() -> Callable[[], uuid.UUID]:
    count = itertools.count(1)
    return lambda: uuid.UUID(int=next(count))


def created(*extents: Extent, lost: tuple[LostRange, ...] = ()) -> Metadata:
    """The metadata of the target after its creation, or after one remap."""
    metadata = plan_present(REQUEST, blank(), numbered_uuids()).metadata
    assert metadata is not None
    metadata = replace(metadata, timestamp_ns=1)
    return metadata.successor(2, extents=merge(extents), lost=lost) if extents else metadata


def marked(metadata: Metadata | None = None) -> Seen:
    """The target is not active, and its spares carry its metadata."""
    known = metadata or created()
    candidates = tuple(candidate(path, known, index) for index, path in enumerate(REQUEST.spares))
    return replace(blank(), candidates=candidates)


def active(metadata: Metadata | None = None, frozen: bool = False, opened: int = 0) -> ActiveTarget:
    seen = marked(metadata)
    choice = copies.choose({c.info.path: c.survey for c in seen.candidates})
    spares = tuple(
        ActiveSpare(index, f"253:{index}", replace(c, info=held(c.info, index)))
        for index, c in enumerate(seen.candidates)
    )
    return ActiveTarget(
        device=mapped(NAME, 2, opened),
        map=mapped(NAME, 2, opened),
        table=(Segment(0, MAIN_SECTORS, "linear", "8:0 0"),),
        main=info("/dev/main", used_by=(Use("main", "held by", NAME),)),
        spares=spares,
        choice=choice,
        frozen=mapped(f"{NAME}-frozen", 3) if frozen else None,
    )


def held(device: DeviceInfo, index: int) -> DeviceInfo:
    return replace(device, used_by=(Use(device.path, "held by", f"{NAME}-spare{index}-data"),))


def mapped(name: str, minor: int, opened: int = 0) -> MappedDevice:
    return MappedDevice(name, f"DMREMAP-{name}", 253, minor, False, opened, True, False)


def seen_active(target: ActiveTarget) -> Seen:
    return Seen(target, (), target.main, tuple(spare.candidate for spare in target.spares))


def kinds(plan: Plan) -> list[str]:
    return [action.kind for action in plan.actions]


# Creation


def test_a_creation_in_its_order() -> None:
    plan = plan_present(REQUEST, blank(), numbered_uuids())
    assert [(action.kind, action.device) for action in plan.actions] == [
        ("format_spare", "/dev/spare0"),
        ("format_spare", "/dev/spare1"),
        ("activate_spare", "/dev/spare0"),
        ("activate_spare", "/dev/spare1"),
        ("commit_metadata", NAME),
        ("create_target", "/dev/mapper/data"),
    ]
    assert plan.changes
    assert plan.before == {"generation": None, "config": None, "table": []}
    assert plan.after["generation"] == 1
    assert plan.after["table"] == [f"0 {MAIN_SECTORS} linear main 0"]
    assert plan.after["config"]["chunk_size"] == 65536
    assert plan.warnings == ()


def test_the_metadata_of_a_creation_can_be_committed_and_names_the_devices() -> None:
    metadata = created()
    assert metadata.body
    assert metadata.config["name"] == NAME
    assert metadata.config["main"]["serial"] == "serial-0"
    assert metadata.config["main"]["sectors"] == MAIN_SECTORS
    assert [spare["serial"] for spare in metadata.config["spares"]] == ["serial-16", "serial-32"]
    assert (metadata.generation, metadata.extents, metadata.lost) == (1, (), ())


def test_what_a_killed_command_left_is_removed_first() -> None:
    seen = with_spare(
        replace(blank(), remains=("data-spare0-data",)),
        0,
        info_used_by=(Use("spare0", "held by", "data-spare0-data"),),
    )
    plan = plan_present(REQUEST, seen)
    assert plan.actions[0] == Action("remove_remains", "data-spare0-data")


def test_with_wipe_the_content_is_erased_and_named() -> None:
    seen = with_spare(blank(), 1, signatures=("ext4",))
    plan = plan_present(replace(REQUEST, wipe=True), seen)
    assert plan.actions[1] == Action("wipe_spare", "/dev/spare1", {"content": ["ext4"]})
    assert kinds(plan).count("wipe_spare") == 1


@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize("remaps", [(), (Extent(3, 2, 0, 0),)], ids=["no remaps", "remaps"])
def test_wipe_alone_erases_no_remapped_chunk(remaps: tuple[Extent, ...], discard: bool) -> None:
    metadata = created(*remaps)
    request = replace(REQUEST, wipe=True, discard_remaps=discard)
    plan = plan_present(request, marked(metadata))
    assert plan.metadata is not None
    if remaps and not discard:
        assert plan.metadata.extents == metadata.extents
        assert not {"wipe_spare", "format_spare"} & set(kinds(plan))
        with pytest.raises(Refused, match="2 remapped chunks of it can be on it only"):
            plan_present(replace(request, name="other"), marked(metadata))
    else:
        assert kinds(plan)[:2] == ["wipe_spare", "format_spare"]
        assert plan.metadata.target_uuid != metadata.target_uuid
        assert "wipe_spare" in kinds(plan_present(replace(request, name="other"), marked(metadata)))


def test_wipe_alone_does_not_choose_between_two_histories() -> None:
    mine, other = created(Extent(3, 2, 0, 0)), created(Extent(7, 2, 0, 0))
    seen = with_spare(marked(mine), 1, survey=survey_of(other, 1))
    request = replace(REQUEST, wipe=True)
    with pytest.raises(copies.SplitBrain):
        plan_present(request, seen)
    assert "wipe_spare" in kinds(plan_present(replace(request, discard_remaps=True), seen))


@pytest.mark.parametrize("key", ["serial", "wwn", "model"])
def test_a_clone_of_a_spare_is_refused(key: str) -> None:
    known = with_spare(blank(), 0, **{f"info_{key}": "original"})
    metadata = plan_present(REQUEST, known, numbered_uuids()).metadata
    assert metadata is not None
    seen = with_spare(marked(replace(metadata, timestamp_ns=1)), 0, **{f"info_{key}": "copy"})
    with pytest.raises(Refused, match=f"has {key} 'copy', but the target's spare 0 has 'original'"):
        plan_present(REQUEST, seen)


@pytest.mark.parametrize("absent", [False, True])
def test_a_spare_that_was_used_for_something_else_since_is_refused(absent: bool) -> None:
    seen = with_spare(marked(), 1, signatures=(OWN_SIGNATURE, "ext4"))
    with pytest.raises(Refused, match="was used for ext4 since") as caught:
        plan_absent(NAME, None, seen) if absent else plan_present(REQUEST, seen)
    assert caught.value.device == "/dev/spare1"


def test_one_disk_by_two_paths_is_refused() -> None:
    both = with_main(with_spare(blank(), 0, info_wwn="0x5"), wwn="0x5")
    with pytest.raises(Refused, match="another path to the same disk"):
        plan_present(REQUEST, both)
    spares = with_spare(with_spare(blank(), 0, info_wwn="0x5"), 1, info_wwn="0x5")
    with pytest.raises(Refused, match="both are paths to one disk"):
        plan_present(REQUEST, spares)


@pytest.mark.parametrize("block", [1024, 2048])
def test_blocks_of_other_sizes_are_refused(block: int) -> None:
    seen = with_main(blank(), logical_block=block)
    for position in (0, 1):
        seen = with_spare(seen, position, info_logical_block=block)
    with pytest.raises(Refused, match=f"has logical blocks of {block} bytes"):
        plan_present(REQUEST, seen)


def test_a_spare_on_the_disk_of_the_main_is_warned_of() -> None:
    seen = with_main(with_spare(blank(), 0, info_disk="9:0"), disk="9:0")
    (warning,) = plan_present(REQUEST, seen).warnings
    assert "/dev/spare0 is on the same disk as the main" in warning


# Held errors


def held_target(path: PathState | None, standing: bool = False, **config: str) -> ActiveTarget:
    """An active target whose metadata says one thing of errors, and the kernel perhaps another."""
    metadata = created()
    metadata = replace(metadata, config={**metadata.config, **config})
    target = active(metadata)
    return replace(target, path=path, shim=mapped(f"{NAME}-shim", 9) if standing else None)


HELD = PathState(active=True, queueing=True, devno="253:7")


@pytest.mark.parametrize(
    ("wanted", "path", "recorded", "expected"),
    [
        (None, HELD, "hold", []),
        (None, None, "fail", []),
        ("hold", HELD, "hold", []),
        ("fail", None, "fail", []),
        ("hold", None, "fail", ["update_config", "hold_errors"]),
        ("fail", HELD, "hold", ["update_config", "pass_errors"]),
        # A switch that was interrupted.
        (None, None, "hold", ["hold_errors"]),
        (None, HELD, "fail", ["pass_errors"]),
        ("fail", None, "hold", ["update_config"]),
        ("hold", HELD, "fail", ["update_config"]),
        # The kernel's fail-safe was at work.
        (None, replace(HELD, active=False, queueing=False), "hold", ["restore_hold"]),
        (None, replace(HELD, queueing=False), "hold", ["restore_hold"]),
    ],
)
def test_holding_errors_is_switched_online(
    wanted: str | None, path: PathState | None, recorded: str, expected: list[str]
) -> None:
    target = held_target(path, on_error=recorded)
    plan = plan_present(replace(REQUEST, on_error=wanted), seen_active(target))
    assert kinds(plan) == expected
    changed = "update_config" in expected
    assert plan.after["generation"] == target.metadata.generation + changed
    assert plan.after["config"]["on_error"] == (wanted or recorded)


@pytest.mark.parametrize(
    ("wanted", "bus", "standing", "recorded", "expected"),
    [
        (None, "nvme", False, "none", []),
        ("none", "nvme", False, "none", []),
        ("auto", "virtio", False, "none", []),
        ("auto", "ata", False, "none", []),
        ("auto", "nvme", False, "none", ["update_config", "insert_shim"]),
        ("auto", "scsi", False, "none", ["update_config", "insert_shim"]),
        ("raid", "ata", False, "none", ["update_config", "insert_shim"]),
        ("raid", "ata", True, "raid", []),
        (None, "ata", True, "raid", []),
        ("none", "nvme", True, "raid", ["update_config", "remove_shim"]),
        (None, "nvme", True, "none", ["remove_shim"]),
        (None, "nvme", False, "raid", ["insert_shim"]),
    ],
)
def test_the_shim_is_switched_online(
    wanted: str | None, bus: str, standing: bool, recorded: str, expected: list[str]
) -> None:
    target = held_target(HELD, standing, on_error="hold", shim=recorded)
    seen = with_main(seen_active(target), bus=bus)
    assert kinds(plan_present(replace(REQUEST, on_error=None, shim=wanted), seen)) == expected


def test_errors_are_held_only_where_somebody_heals_them() -> None:
    for wanted in (None, "hold"):
        request = replace(REQUEST, on_error=wanted)
        with pytest.raises(Refused, match="the daemon that heals it does not run"):
            plan_present(request, replace(blank(), healer=False))
        plan = plan_present(request, blank())
        assert plan.metadata is not None
        assert plan.metadata.config["on_error"] == "hold"
    passed = seen_active(held_target(None, on_error="fail"))
    with pytest.raises(Refused, match="the daemon that heals it does not run"):
        plan_present(replace(REQUEST, on_error="hold"), replace(passed, healer=False))
    # What is held already stays so, and what was held comes back before the daemon does.
    standing = replace(seen_active(held_target(HELD, on_error="hold")), healer=False)
    assert plan_present(replace(REQUEST, on_error="hold"), standing).actions == ()
    metadata = replace(created(), config={**created().config, "on_error": "hold"})
    activation = plan_present(
        replace(REQUEST, on_error=None), replace(marked(metadata), healer=False)
    )
    assert kinds(activation)[-1] == "create_target"


def test_what_an_interruption_left_in_the_kernel_is_tidied() -> None:
    assert kinds(plan_upkeep(replace(active(), tidy=False))) == ["tidy"]
    assert kinds(plan_upkeep(replace(active(frozen=True), tidy=False))) == ["thaw"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "not a valid target name"),
        ({"name": ""}, "not a valid target name"),
        ({"on_error": "ignore"}, "on_error 'ignore' is not known"),
        ({"shim": "loop"}, "shim 'loop' is not known"),
        ({"spares": ()}, "has 0 spares"),
        ({"spares": ("/dev/spare0",) * 9}, "has 9 spares"),
        ({"chunk_bytes": 2048}, "chunk of 2048 bytes"),
        ({"chunk_bytes": 2 << 20}, "chunk of 2097152 bytes"),
        ({"chunk_bytes": 65536 + 4096}, "chunk of 69632 bytes"),
    ],
)
def test_wrong_requests(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DmRemapError, match=message):
        plan_present(replace(REQUEST, **change), blank())


@pytest.mark.parametrize(
    ("seen", "device", "message"),
    [
        (replace(blank(), main=None), "/dev/main", "no such device"),
        (with_main(blank(), read_only=True), "/dev/main", "read-only"),
        (
            with_main(blank(), used_by=(Use("main1", "mounted on", "/srv"),)),
            "/dev/main",
            "main1 is mounted on /srv",
        ),
        (with_main(blank(), sectors=CHUNK - 1), "/dev/main", "smaller than a chunk"),
        (with_main(blank(), physical_block=1 << 17), "/dev/main", "not a multiple"),
        (with_spare(blank(), 0, info_devno="8:0", info_disk="8:0"), "/dev/spare0", "main itself"),
        (with_spare(blank(), 1, info_disk="8:0"), "/dev/spare1", "shares its sectors"),
        (with_main(blank(), disk="8:16"), "/dev/spare0", "shares its sectors"),
        (
            with_spare(blank(), 1, info_devno="8:16", info_disk="8:16"),
            "/dev/spare1",
            "given twice, also as /dev/spare0",
        ),
        (with_spare(blank(), 1, info_disk="8:16"), "/dev/spare0", "contains the spare /dev/spare1"),
        (with_spare(blank(), 1, info_read_only=True), "/dev/spare1", "read-only"),
        (
            with_spare(blank(), 0, info_used_by=(Use("spare0", "in use as", "swap"),)),
            "/dev/spare0",
            "spare0 is in use as swap",
        ),
        (with_spare(blank(), 0, info_logical_block=4096), "/dev/spare0", "blocks of 4096 bytes"),
        (with_spare(blank(), 0, info_physical_block=1 << 17), "/dev/spare0", "not a multiple"),
        (with_spare(blank(), 1, info_sectors=30000), "/dev/spare1", "too few"),
        (with_spare(blank(), 1, signatures=("LVM2_member",)), "/dev/spare1", "LVM2_member"),
    ],
)
def test_devices_that_will_not_do(seen: Seen, device: str, message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        plan_present(REQUEST, seen)
    assert caught.value.device == device
    assert caught.value.remedy


def test_a_name_that_something_else_has_is_refused() -> None:
    with pytest.raises(Refused, match="of something else") as caught:
        plan_present(REQUEST, replace(blank(), taken=("data-spare0",)))
    assert caught.value.device == "/dev/mapper/data-spare0"


def test_a_slot_that_cannot_be_read_is_not_an_empty_device() -> None:
    seen = blank()
    survey = seen.candidates[0].survey
    slot = replace(survey.failed[0], diagnosis=Diagnosis.UNREADABLE)
    with pytest.raises(Refused, match="unreadable"):
        plan_present(
            REQUEST, with_spare(seen, 0, survey=replace(survey, failed=(slot, *survey.failed[1:])))
        )


# Activation


def test_an_activation_creates_nothing_anew() -> None:
    metadata = created(Extent(3, 1, 0, 0))
    plan = plan_present(REQUEST, marked(metadata))
    assert kinds(plan) == ["activate_spare", "activate_spare", "create_target"]
    assert plan.metadata == metadata
    assert plan.after["generation"] == 2
    assert plan.after["table"][1] == "384 128 linear spare0 0"


def test_spares_may_be_given_in_any_order() -> None:
    seen = marked()
    plan = plan_present(REQUEST, replace(seen, candidates=seen.candidates[::-1]))
    assert [plan.spares[index].path for index in (0, 1)] == ["/dev/spare0", "/dev/spare1"]


def test_a_stale_spare_is_brought_up_to_date_first() -> None:
    old = created()
    new = old.successor(5, extents=(Extent(3, 1, 0, 0),))
    candidates = (candidate("/dev/spare0", new, 0), candidate("/dev/spare1", old, 1))
    plan = plan_present(REQUEST, replace(blank(), candidates=candidates))
    assert plan.metadata == new
    assert plan.actions[0] == Action("repair_metadata", "/dev/spare1")


def test_an_interrupted_first_commit_is_continued() -> None:
    candidates = (candidate("/dev/spare0", created(), 0), candidate("/dev/spare1"))
    plan = plan_present(REQUEST, replace(blank(), candidates=candidates))
    assert plan.actions[0] == Action("repair_metadata", "/dev/spare1")
    assert kinds(plan)[1:] == ["activate_spare", "activate_spare", "create_target"]


@pytest.mark.parametrize(
    "second",
    [
        replace(candidate("/dev/spare1"), signatures=("ext4",)),
        candidate("/dev/spare1", serial="another"),
        candidate("/dev/spare1", sectors=SPARE_SECTORS + 8),
    ],
    ids=["not empty", "another disk", "another size"],
)
def test_another_device_does_not_continue_a_creation(second: Candidate) -> None:
    candidates = (candidate("/dev/spare0", created(), 0), second)
    with pytest.raises(Refused, match="carries no metadata of target 'data'"):
        plan_present(REQUEST, replace(blank(), candidates=candidates))


def test_an_empty_spare_of_a_target_with_remaps_is_refused() -> None:
    metadata = created(Extent(3, 1, 0, 0))
    candidates = (candidate("/dev/spare0", metadata, 0), candidate("/dev/spare1"))
    with pytest.raises(Refused, match="carries no metadata") as caught:
        plan_present(REQUEST, replace(blank(), candidates=candidates))
    assert caught.value.device == "/dev/spare1"


def test_all_spares_of_a_target_are_wanted() -> None:
    seen = marked()
    request = replace(REQUEST, spares=REQUEST.spares[:1])
    with pytest.raises(Refused, match="would be activated without spare 1 .*serial-32"):
        plan_present(request, replace(seen, candidates=seen.candidates[:1]))


def test_a_spare_that_left_the_target_is_refused() -> None:
    old = created()
    config = {**old.config, "spares": [old.config["spares"][0], None]}
    new = old.successor(5, config=config)
    candidates = (candidate("/dev/spare0", new, 0), candidate("/dev/spare1", old, 1))
    seen = replace(blank(), candidates=candidates)
    with pytest.raises(Refused, match="not a spare of this target any more") as caught:
        plan_present(REQUEST, seen)
    assert caught.value.device == "/dev/spare1"


def test_spares_of_another_target_are_refused() -> None:
    with pytest.raises(Refused, match="is a spare of target 'data'"):
        plan_present(replace(REQUEST, name="other"), marked())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sectors": MAIN_SECTORS + 8}, f"has {MAIN_SECTORS + 8} sectors"),
        ({"logical_block": 4096}, "blocks of 4096 bytes"),
        ({"serial": "clone"}, "has serial 'clone'"),
        ({"model": "Other"}, "has model 'Other'"),
    ],
)
def test_another_main_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        plan_present(REQUEST, with_main(marked(), **change))
    assert caught.value.device == "/dev/main"


def test_a_main_that_does_not_say_who_it_is_is_taken_by_its_size() -> None:
    assert plan_present(REQUEST, with_main(marked(), serial="", model="")).changes


@pytest.mark.parametrize("seen", [marked(), seen_active(active())], ids=["inactive", "active"])
def test_the_chunk_size_cannot_be_changed(seen: Seen) -> None:
    assert plan_present(replace(REQUEST, chunk_bytes=65536), seen)
    with pytest.raises(Refused, match="chunks of 65536 bytes, which cannot be changed"):
        plan_present(replace(REQUEST, chunk_bytes=4096), seen)


def test_metadata_of_a_newer_version_is_refused() -> None:
    seen = marked()
    newer = replace(seen.candidates[0].survey, newer=True)
    with pytest.raises(NewerFormat):
        plan_present(REQUEST, with_spare(seen, 0, survey=newer))


# An active target


def test_a_second_run_plans_nothing() -> None:
    plan = plan_present(REQUEST, seen_active(active()))
    assert plan.actions == ()
    assert not plan.changes
    assert plan.before == plan.after


def test_an_active_target_keeps_its_main() -> None:
    seen = seen_active(active())
    other = replace(seen, main=info("/dev/main", devno="8:99"))
    with pytest.raises(Refused, match="on the same disk as the main"):
        plan_present(REQUEST, other)


def test_the_spares_of_an_active_target_are_changed_as_the_list_is() -> None:
    seen = seen_active(active())
    fewer = replace(seen, candidates=seen.candidates[:1])
    plan = plan_present(replace(REQUEST, spares=REQUEST.spares[:1]), fewer)
    assert kinds(plan) == ["remove_spare", "wipe_metadata", "deactivate_spare"]
    third = replace(seen, candidates=(*seen.candidates[:1], candidate("/dev/spare2")))
    plan = plan_present(replace(REQUEST, spares=("/dev/spare0", "/dev/spare2")), third)
    assert kinds(plan) == [
        "format_spare",
        "activate_spare",
        "add_spare",
        "remove_spare",
        "wipe_metadata",
        "deactivate_spare",
    ]
    twice = replace(seen, candidates=(*seen.candidates, seen.candidates[0]))
    with pytest.raises(Refused, match="is given twice"):
        plan_present(replace(REQUEST, spares=(*REQUEST.spares, "/dev/spare0")), twice)


def test_a_target_without_sectors_of_main_is_known_by_its_spares() -> None:
    target = replace(active(), main=None)
    seen = replace(seen_active(target), main=info("/dev/main"))
    assert plan_present(REQUEST, seen).actions == ()


def test_an_interrupted_remap_is_ended() -> None:
    assert kinds(plan_upkeep(active(frozen=True))) == ["thaw"]


def with_fault(target: ActiveTarget, diagnosis: Diagnosis) -> ActiveTarget:
    fault = FailedCopy(3, 4096, diagnosis, f"{diagnosis.value}: sector 4096")
    damaged = {"/dev/spare1": (fault,)}
    return replace(target, choice=replace(target.choice, damaged=damaged))


@pytest.mark.parametrize(
    "diagnosis", [item for item in Diagnosis if item is not Diagnosis.UNREADABLE]
)
def test_damaged_copies_are_repaired(diagnosis: Diagnosis) -> None:
    plan = plan_upkeep(with_fault(active(), diagnosis))
    assert plan.actions == (Action("repair_metadata", "/dev/spare1"),)
    assert plan.warnings == ()


def test_a_copy_that_cannot_be_read_is_told_and_not_repaired_for_ever() -> None:
    plan = plan_upkeep(with_fault(active(), Diagnosis.UNREADABLE))
    assert plan.actions == ()
    assert plan.warnings == ("/dev/spare1: copy 3 of the metadata is unreadable: sector 4096",)


def test_repairs_come_before_the_end_of_a_remap() -> None:
    plan = plan_upkeep(with_fault(active(frozen=True), Diagnosis.SEQUENCE))
    assert kinds(plan) == ["repair_metadata", "thaw"]


# Removal


def test_an_active_target_is_removed_from_above() -> None:
    target = active()
    plan = plan_absent(NAME, target, seen_active(target))
    assert [(action.kind, action.device) for action in plan.actions] == [
        ("remove_target", "/dev/mapper/data"),
        ("note_removal", "data"),
        ("wipe_metadata", "/dev/spare0"),
        ("wipe_metadata", "/dev/spare1"),
        ("deactivate_spare", "/dev/spare0"),
        ("deactivate_spare", "/dev/spare1"),
    ]
    assert plan.after["config"] is None


def test_a_target_in_use_is_not_removed() -> None:
    target = active(opened=1)
    with pytest.raises(Refused, match="is in use, opened 1 time;"):
        plan_absent(NAME, target, seen_active(target), discard_remaps=True)


@pytest.mark.parametrize("running", [True, False], ids=["active", "inactive"])
def test_data_that_is_only_on_spares_is_not_discarded_unasked(running: bool) -> None:
    metadata = created(Extent(3, 2, 0, 0), Extent(9, 1, 1, 4))
    target = active(metadata) if running else None
    seen = seen_active(target) if target else marked(metadata)
    with pytest.raises(Refused, match="has 3 chunks whose data is on its spares only"):
        plan_absent(NAME, target, seen)
    assert "wipe_metadata" in kinds(plan_absent(NAME, target, seen, discard_remaps=True))


def test_an_inactive_target_is_wiped_where_its_metadata_is() -> None:
    seen = replace(marked(), remains=("data-spare0",))
    plan = plan_absent(NAME, None, seen)
    assert [(action.kind, action.device) for action in plan.actions] == [
        ("note_removal", "data"),
        ("wipe_metadata", "/dev/spare0"),
        ("wipe_metadata", "/dev/spare1"),
        ("remove_remains", "data-spare0"),
    ]


def test_spares_of_another_target_are_not_wiped() -> None:
    with pytest.raises(Refused, match="is a spare of target 'data'"):
        plan_absent("other", None, marked())


def test_spares_in_use_are_not_wiped() -> None:
    seen = with_spare(marked(), 1, info_used_by=(Use("spare1", "mounted on", "/mnt"),))
    with pytest.raises(Refused, match="mounted on /mnt"):
        plan_absent(NAME, None, seen)


def test_the_absence_of_nothing_is_nothing() -> None:
    assert plan_absent(NAME, None, blank()).actions == ()
    left = replace(blank(), remains=("data-spare0", "data-spare0-data"))
    assert kinds(plan_absent(NAME, None, left)) == ["remove_remains", "remove_remains"]


# Remaps


def test_a_remap_names_each_chunk_and_the_generation() -> None:
    plan = plan_remap(active(), [(130, 1), (MAIN_SECTORS - 1, 1)])
    assert plan.action_dicts() == [
        {
            "action": "remap_chunk",
            "device": NAME,
            "chunk": 1,
            "start": 128,
            "count": 128,
            "spare": 0,
            "spare_chunk": 0,
        },
        {
            "action": "remap_chunk",
            "device": NAME,
            "chunk": 20,
            "start": 2560,
            "count": 40,
            "spare": 0,
            "spare_chunk": 1,
        },
        {"action": "commit_metadata", "device": NAME, "generation": 2},
    ]
    assert plan.before["generation"] == 1
    assert plan.after["generation"] == 2
    assert [extent.logical for extent in plan.placed] == [1, 20]


def test_chunks_that_are_on_a_spare_are_left_alone() -> None:
    target = active(created(Extent(1, 1, 0, 0)))
    plan = plan_remap(target, [(128, 256)])
    assert [extent.logical for extent in plan.placed] == [2]
    assert plan_remap(target, [(128, 128)]).actions == ()


def test_shunned_chunks_are_not_used() -> None:
    plan = plan_remap(active(), [(0, 1)], avoid=[(0, 0), (0, 1)])
    assert [(extent.spare, extent.physical) for extent in plan.placed] == [(0, 2)]


def test_a_generation_that_is_not_the_expected_one() -> None:
    target = active()
    assert plan_remap(target, [(0, 1)], expected_generation=1).changes
    with pytest.raises(StaleGeneration, match="at generation 1, not 7"):
        plan_remap(target, [(0, 1)], expected_generation=7)


@pytest.mark.parametrize("wrong", [(-1, 1), (0, 0), (MAIN_SECTORS, 1), (0, MAIN_SECTORS + 1)])
def test_sectors_beside_the_target(wrong: tuple[int, int]) -> None:
    with pytest.raises(Refused, match="not on the target") as caught:
        plan_remap(active(), [wrong])
    assert caught.value.device == NAME


@pytest.mark.parametrize("cut", [(1, 8), (0, 4), (12, 4), (4, 8)])
def test_ranges_that_cut_a_logical_block(cut: tuple[int, int]) -> None:
    metadata = created()
    metadata = replace(metadata, config={**metadata.config, "block_sectors": 8})
    target = replace(active(), choice=replace(active().choice, metadata=metadata))
    assert plan_remap(target, [(8, 16)]).changes
    with pytest.raises(Refused):
        plan_remap(target, [cut])


def test_full_spares() -> None:
    target = active()
    everything = [(index, chunk) for index in (0, 1) for chunk in range(100000 // CHUNK)]
    with pytest.raises(Refused, match="have 0 free chunks, and 1 are needed") as caught:
        plan_remap(target, [(0, 1)], avoid=everything)
    assert caught.value.device == NAME


def test_a_remap_first_does_the_upkeep() -> None:
    plan = plan_remap(with_fault(active(frozen=True), Diagnosis.SEQUENCE), [(0, 1)])
    assert kinds(plan) == ["repair_metadata", "thaw", "remap_chunk", "commit_metadata"]


# Policies


def with_config(metadata: Metadata, **changes: Any) -> Metadata:
    """The next generation, with other values in its configuration; None takes one out."""
    config = {key: value for key, value in {**metadata.config, **changes}.items() if value}
    return metadata.successor(2, config=config)


def test_a_new_target_has_policies() -> None:
    assert created().config["allocation"] == "first_fit"
    assert created().config["thresholds"] == {"warn": 80, "critical": 95}
    asked = replace(REQUEST, allocation="health", critical=90)
    plan = plan_present(asked, blank(), numbered_uuids())
    assert plan.metadata is not None
    assert plan.metadata.config["allocation"] == "health"
    assert plan.metadata.config["thresholds"] == {"warn": 80, "critical": 90}
    assert plan.after["config"]["allocation"] == "health"
    assert plan.after["config"]["thresholds"] == {"warn": 80, "critical": 90}


@pytest.mark.parametrize("running", [True, False])
def test_a_change_of_policies_is_a_generation_with_nothing_else(running: bool) -> None:
    old = with_config(created(Extent(3, 2, 0, 0)), thresholds={"warn": 70, "later": [1]}, new="x")
    seen = seen_active(active(old)) if running else marked(old)
    asked = replace(REQUEST, allocation="balanced", critical=90)
    plan = plan_present(asked, seen)
    changed = {
        "allocation": "balanced",
        "thresholds": {"warn": 70, "critical": 90, "later": [1]},
    }
    assert plan.actions[-1] == Action("update_config", NAME, {"generation": 4, **changed})
    assert kinds(plan).count("update_config") == 1
    assert plan.metadata == replace(old, generation=4, config={**old.config, **changed})
    assert plan.after["generation"] == 4
    assert plan.after["config"]["thresholds"] == {"warn": 70, "critical": 90}
    assert plan.after["table"] == plan_upkeep(active(old)).after["table"]
    if running:
        assert plan.before == plan_upkeep(active(old)).before
        assert len(plan.actions) == 1
    done = plan.metadata.successor(3)
    assert plan_present(asked, seen_active(active(done))).actions == ()
    assert plan_present(REQUEST, seen_active(active(done))).actions == ()


def test_old_metadata_has_the_default_policies_without_a_change() -> None:
    old = with_config(created(), allocation=None, thresholds=None)
    assert "thresholds" not in old.config
    asked = replace(REQUEST, allocation="first_fit", warn=80, critical=95)
    assert plan_present(asked, seen_active(active(old))).actions == ()
    assert plan_upkeep(active(old)).after["config"]["thresholds"] == {"warn": 80, "critical": 95}


def test_a_repair_comes_before_a_change_of_policies() -> None:
    target = with_fault(active(frozen=True), Diagnosis.MAGIC)
    plan = plan_present(replace(REQUEST, warn=50), seen_active(target))
    assert kinds(plan) == ["repair_metadata", "thaw", "update_config"]


@pytest.mark.parametrize("seen", [blank(), marked(), seen_active(active())])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"allocation": "best"}, "data: allocation 'best' is not known"),
        ({"warn": 96}, "data: thresholds warn 96 and critical 95 are not possible"),
        ({"warn": 0}, "warn 0 and critical 95"),
        ({"critical": 101}, "critical 101"),
    ],
)
def test_wrong_policies_are_refused(seen: Seen, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        plan_present(replace(REQUEST, **wrong), seen)


def test_a_remap_goes_where_policy_scores_and_bad_places_let_it() -> None:
    old = with_config(created(Extent(3, 1, 0, 0)), allocation="balanced")
    first, second = (spare["uuid"] for spare in old.config["spares"])
    assert plan_remap(active(old), [(0, 1)]).placed == (Extent(0, 1, 1, 0),)
    health = {"spares": {first: {"score": 40}, second: {"score": 60, "bad_chunks": [0, 1]}}}
    sick = replace(with_config(old, allocation="health"), health=health)
    assert plan_remap(active(sick), [(0, 1)]).placed == (Extent(0, 1, 1, 2),)
    assert plan_remap(active(sick), [(0, 1)], avoid=[(1, 2)]).placed == (Extent(0, 1, 1, 3),)


def test_a_pool_that_fills_is_warned_of() -> None:
    metadata = created()
    room = sum(geometry_of(metadata, index).usable_chunks for index in (0, 1))
    bad = list(range(geometry_of(metadata, 0).chunks))
    uuids = [spare["uuid"] for spare in metadata.config["spares"]]
    half = replace(metadata.successor(2), health={"spares": {uuids[0]: {"bad_chunks": bad}}})
    limit = with_config(half, thresholds={"warn": 51, "critical": 60})
    assert plan_upkeep(active(limit)).warnings == ()
    # A hundredth of the spares is more than one chunk, so some remaps reach it.
    count = 51 * room // 100 - room // 2 + 1
    assert count <= 20
    plan = plan_remap(active(limit), [(0, count * CHUNK)])
    assert plan.warnings == (
        f"data: the spares are filled to 51 % (warn), and {room // 2 - count} chunks of {room} "
        "can still be remapped",
    )
    assert plan_present(replace(REQUEST, warn=50), seen_active(active(limit))).warnings
    assert not plan_present(replace(REQUEST, warn=60), seen_active(active(limit))).warnings
    lowered = with_config(half, thresholds={"warn": 50})
    assert plan_upkeep(active(lowered)).warnings
    assert not plan_present(replace(REQUEST, warn=60), seen_active(active(lowered))).warnings
