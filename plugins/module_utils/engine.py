# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Observes targets and carries plans out, in an order that a crash cannot hurt."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from . import (
    backups,
    blockdev,
    copies,
    extents,
    files,
    memory,
    migration,
    replacement,
    replacing,
    stack,
)
from .blockdev import DeviceInfo
from .committing import Committer, host_id
from .devices import Blocks, Disks, Mapper, OpenDevice, Opener
from .devmapper import DeviceMapper, check_name
from .errors import DmRemapError, Refused
from .exchanging import Exchanger
from .format import MAX_SPARES, Metadata, geometry_of, spare_uuid_of
from .freezing import Freezer, existing
from .guarding import Guard
from .holding import Hold
from .locks import LOCK_DIR, Locks
from .migrating import Migrator
from .moved import Moved, RemappedChunk, RemapReport, staying
from .moving import Mover, Steps, Wanted, all_of_them
from .observing import Observer
from .placing import TO_SPARES, Placer, Route
from .plan import Action, Plan, index_of, metadata_of
from .plan_remap import plan_remap, plan_return, remap_actions, return_actions
from .plan_upkeep import plan_upkeep
from .salvage import Patience
from .stacking import Stacker, dm_uuid
from .target import HOLD, RAID_SHIM, ActiveTarget, configured, map_table, sectors_on, shim_of
from .tracing import REFLEX_INSTANCE, TraceInstance

_KERNEL_TARGETS = ("integrity", "delay", "multipath")


class Engine(Observer):
    """Observes and changes targets on this host.

    An action of a plan is carried out by the method that is called after it; what takes more than
    a few steps is left to the object whose work it is.

    Args:
        mapper: device-mapper.
        blocks: block devices (the module `blockdev`, or a stand-in in tests).
        step: called with a name after each step that a crash could follow.
        progress: called with a sentence when something long begins.
        lock_dir: folder of the lock files.
        backup_dir: folder of the metadata backups.
        guard: while I/O is frozen, keep a second process that ends the freeze if this one is
            killed. Only for processes with one thread.
        errors: lines of the healer's trace that it has not taken out.
    """

    def __init__(
        self,
        mapper: Mapper | None = None,
        blocks: Blocks = blockdev,
        step: Callable[[str], None] | None = None,
        progress: Callable[[str], None] | None = None,
        lock_dir: str = LOCK_DIR,
        backup_dir: str = backups.FOLDER,
        guard: bool = False,
        errors: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        mapper = mapper or DeviceMapper()
        super().__init__(mapper, blocks, Locks(lock_dir), backups.Backups(backup_dir))
        step = self._step = step or (lambda name: None)
        progress = self._progress = progress or (lambda text: None)
        self._opener = Opener(blocks)
        self._freezer = Freezer(mapper, step)
        self._stack = Stacker(mapper, self, self._freezer, step)
        self._committer = Committer(blocks, self._opener, self.backup, step, progress)
        self._guard = Guard(mapper, self, self._freezer, self._committer, guard)
        self._hold = Hold(
            mapper,
            self,
            self._freezer,
            self._stack,
            self._guard,
            step,
            errors or TraceInstance(name=REFLEX_INSTANCE).peek,
        )
        self._placer = Placer(mapper, step)
        self._mover = Mover(
            mapper,
            self._freezer,
            self._placer,
            self._committer,
            self._guard,
            self._hold,
            step,
            progress,
        )
        self._migrator = Migrator(
            mapper,
            blocks,
            self._opener,
            self._stack,
            self._placer,
            self._committer,
            step,
            progress,
        )
        self._exchanger = Exchanger(
            mapper,
            self,
            self._opener,
            self._freezer,
            self._stack,
            self._committer,
            self._guard,
            self._hold,
            self._mover,
            step,
            progress,
        )

    def check_host(self) -> None:
        """Check that this process may use device-mapper and that the kernel has what is needed.

        Raises:
            Refused: not root.
            MissingKernelFeature: no device-mapper, or one of its targets is missing.
        """
        if os.geteuid() != 0:
            raise Refused("only root can do this", remedy="become root")
        known = self._mapper.kernel_targets()
        for target in _KERNEL_TARGETS:
            if target not in known:
                subprocess.run(["modprobe", f"dm-{target}"], capture_output=True, check=False)
        self._mapper.check_available(("linear", *_KERNEL_TARGETS))

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock of target ``name``, waiting for whoever has it."""
        return self._locks.locked(name)

    def try_locked(self, name: str) -> AbstractContextManager[bool]:
        """Hold the lock of target ``name`` if nobody else has it; whether that is so."""
        return self._locks.try_locked(name)

    def locked_host(self) -> AbstractContextManager[None]:
        """Hold the lock under which devices get new owners; take it before a target's lock."""
        return self._locks.locked_host()

    def healing(self) -> AbstractContextManager[None]:
        """Show that this process heals held I/O while the block runs; see `Locks.healing`."""
        return self._locks.healing()

    def healer_runs(self) -> bool:
        """Whether the daemon that heals held I/O runs on this host."""
        return self._locks.healer_runs()

    def apply(self, plan: Plan) -> list[RemappedChunk]:
        """Carry out a plan for a target or its spares; the caller holds its lock.

        Returns:
            What became of the chunks that had to leave a spare.

        Raises:
            DmRemapError: a step failed; what was done so far stays, and a new plan continues.
        """
        chunks: list[RemappedChunk] = []
        for action in plan.actions:
            self._progress(f"{action.kind} {action.device}")
            chunks += getattr(self, f"_do_{action.kind}")(plan, action) or []
            self._step(action.kind)
        return chunks

    def _do_remove_remains(self, plan: Plan, action: Action) -> None:
        if existing(self._mapper, action.device).suspended:
            self._mapper.swap(action.device)
        self._mapper.remove(action.device)

    def _do_wipe_spare(self, plan: Plan, action: Action) -> None:
        self._blocks.erase_signatures(action.device)
        self._wipe_copies(action.device)

    def _do_wipe_metadata(self, plan: Plan, action: Action) -> None:
        # A device whose near copies are damaged may have been resized since.
        entries = plan.metadata.config["spares"] if plan.metadata else []
        sizes = {entry["geometry"]["spare_sectors"] for entry in entries if entry}
        try:
            self._wipe_copies(action.device, sizes)
        except (DmRemapError, OSError) as error:
            if plan.after["generation"] is None and not action.details.get("lost"):
                raise
            # The target goes on without this spare, and its copies count for nothing any more; or
            # the user is warned that a lost one keeps them.
            self._progress(str(error))

    def _do_wipe_main(self, plan: Plan, action: Action) -> None:
        self._blocks.erase_signatures(action.device)
        self._wipe_copies(action.device)

    def _wipe_copies(self, path: str, sizes: Collection[int] = ()) -> None:
        with self._blocks.BlockDevice(path, writable=True) as device:
            copies.wipe(device, copies.survey(device, sizes))

    def _do_note_removal(self, plan: Plan, action: Action) -> None:
        try:
            self._backups.note_removal(metadata_of(plan).target_uuid)
        except OSError as error:
            self._progress(f"the removal is not noted in {self._backups.folder}: {error}")

    def _do_format_spare(self, plan: Plan, action: Action) -> None:
        # With a zeroed superblock the kernel makes a new journal, and with zeroed tags no data
        # sector has a valid one: each reads as an error until it is written.
        geometry = geometry_of(metadata_of(plan), index_of(plan, action.device))
        with self._blocks.BlockDevice(action.device, writable=True) as device:
            try:
                device.zero(geometry.tag_start, geometry.tag_sectors)
                device.flush()
            except OSError as error:
                raise DmRemapError(
                    f"cannot be formatted: {error.strerror or error}",
                    device=action.device,
                    remedy="give another spare",
                ) from error

    def _do_activate_spare(self, plan: Plan, action: Action) -> None:
        index = index_of(plan, action.device)
        self._stack.activate_spare(plan.name, metadata_of(plan), index, plan.spares[index])

    def _do_deactivate_spare(self, plan: Plan, action: Action) -> None:
        self._stack.deactivate_spare(plan.name, metadata_of(plan), action.details["name"])

    def _do_add_spare(self, plan: Plan, action: Action) -> None:
        self._exchanger.add_spare(plan, action.details["index"])

    def _do_remove_spare(self, plan: Plan, action: Action) -> None:
        self._exchanger.remove_spare(plan, action.details["index"])

    def _do_return_spare(self, plan: Plan, action: Action) -> None:
        self._exchanger.return_spare(plan, action.details["index"])

    def _do_serve_spares(self, plan: Plan, action: Action) -> None:
        self._hold.serve(self.require(plan.name))

    def _do_drain_spare(self, plan: Plan, action: Action) -> list[RemappedChunk]:
        return self._exchanger.empty_spare(plan, action, frozenset())

    def _do_discard_chunks(self, plan: Plan, action: Action) -> list[RemappedChunk]:
        return self._exchanger.empty_spare(plan, action, frozenset({action.details["index"]}))

    def _do_commit_metadata(self, plan: Plan, action: Action) -> None:
        draft = replace(metadata_of(plan), timestamp_ns=time.time_ns(), host_id=host_id())
        self._committer.commit_new(plan, None, draft)

    def _do_note_missing(self, plan: Plan, action: Action) -> None:
        self._committer.note_missing(plan, action.details["missing"])

    def _do_repair_metadata(self, plan: Plan, action: Action) -> None:
        self._committer.repair(plan, action.device)

    def _do_restore_metadata(self, plan: Plan, action: Action) -> None:
        target = metadata_of(plan).target_uuid
        backup = self._backups.read(target, action.details["from"])
        self._committer.restore(plan, backup)

    def _do_write_copies(self, plan: Plan, action: Action) -> None:
        metadata = metadata_of(plan)
        spare_uuid = spare_uuid_of(metadata, index_of(plan, action.device))
        with self._blocks.BlockDevice(action.device, writable=True) as device:
            copies.repair(device, copies.only(metadata), spare_uuid)

    def _do_migrate_chunks(self, plan: Plan, action: Action) -> list[RemappedChunk]:
        return self._migrator.copy(plan)

    def _do_verify_migration(self, plan: Plan, action: Action) -> None:
        self._migrator.verify(plan)

    def _do_create_target(self, plan: Plan, action: Action) -> None:
        if plan.main is None:
            raise AssertionError("a plan that creates a target has a main")
        name, metadata, main = plan.name, metadata_of(plan), plan.main
        if plan.migration:
            metadata = self._committer.chosen(plan).metadata
        if migration.unfinished(metadata):
            raise AssertionError("a target is not activated before its migration is verified")
        spares = self._stack.spare_devnos(plan)
        upper_main, flushed = main.devno, ""
        if shim_of(metadata) == RAID_SHIM:
            upper_main = self._stack.create_part(
                metadata,
                name,
                stack.shim_name(name),
                stack.shim_table(metadata.config["main"]["sectors"], main.devno),
            )
            flushed = main.devno
        new_main = ""
        if plan.replacement:
            new_main = self._stack.create_new_main(plan)
            self._stack.create_parked(metadata, name, main.devno)
        table = map_table(metadata, upper_main, spares, flushed, new_main=new_main)
        if metadata.config["on_error"] == HOLD:
            missing = [i for i in configured(metadata) if i not in plan.spares]
            cut = sectors_on(metadata, missing)
            table = self._stack.create_hold(metadata, name, table, main.devno, cut)
        # Without it, the host would not know its target nor whose main it is after a restart.
        kept = self._backups.newest(metadata.target_uuid)
        if kept is None or kept.generation < metadata.generation:
            self.backup(metadata)
        self._mapper.create(name, dm_uuid(metadata), table, private=False)

    def _do_replace_main(self, plan: Plan, action: Action) -> None:
        """Begin the replacement, unless it has begun; `replace_main` carries it on."""
        target = self.require(plan.name)
        if target.replacement or plan.replacement is None or target.main is None:
            return
        self._freezer.check_names(target)
        self._stack.create_new_main(plan)
        self._step("new_main_created")
        paths = [self._lasting_path(info) for info in (plan.replacement, target.main) if info]
        config = replacement.begun(target.metadata.config, plan.replacement, *paths)
        self._committer.commit_config(target, config)

    def _lasting_path(self, info: DeviceInfo) -> str:
        if replacement.lasts(info.path):
            return info.path
        return next(iter(self._blocks.links_to(info.devno)), info.path)

    def _do_undo_replacement(self, plan: Plan, action: Action) -> None:
        """Nothing has to be begun; `replace_main` does it all."""

    def _do_remove_target(self, plan: Plan, action: Action) -> None:
        target = existing(self._mapper, plan.name)
        # A copy that goes on would write to a disk that is not the target's any more.
        with self._locks.copying(plan.name):
            self._mapper.remove(plan.name)
        self._stack.remove_parts(
            target,
            stack.hold_name(plan.name),
            stack.map_name(plan.name),
            stack.frozen_name(plan.name),
            stack.place_name(plan.name),
            stack.shim_name(plan.name),
            stack.new_main_name(plan.name),
        )

    def _do_thaw(self, plan: Plan, action: Action) -> None:
        given_up = action.details.get("without", ())
        self._guard.end_freeze(plan.name, set(range(MAX_SPARES)).difference(given_up), parting=True)

    def _do_tidy(self, plan: Plan, action: Action) -> None:
        target = self.require(plan.name)
        self._guard.resume_spares(target)
        self._stack.clear_leftovers(target)

    def _do_update_config(self, plan: Plan, action: Action) -> None:
        target = self.require(plan.name)
        settings = {key: value for key, value in action.details.items() if key != "generation"}
        self._committer.commit_config(target, {**target.metadata.config, **settings})

    def _do_hold_errors(self, plan: Plan, action: Action) -> None:
        self._hold.hold_errors(self.require(plan.name))

    def _do_pass_errors(self, plan: Plan, action: Action) -> None:
        self._hold.pass_errors(self.require(plan.name))

    def _do_restore_hold(self, plan: Plan, action: Action) -> None:
        self._hold.release_unless_flushed(self.require(plan.name))

    def _do_cut_off(self, plan: Plan, action: Action) -> None:
        self._hold.cut_off(self.require(plan.name))

    def _do_insert_shim(self, plan: Plan, action: Action) -> None:
        self._stack.insert_shim(self.require(plan.name))

    def _do_remove_shim(self, plan: Plan, action: Action) -> None:
        self._stack.remove_shim(self.require(plan.name))

    def replace_main(
        self,
        name: str,
        undo: bool = False,
        pace: replacing.Pace | None = None,
        patience: Patience | None = None,
    ) -> replacing.Result:
        """Carry a replacement that was begun to its end, or back; holds the lock in steps only.

        Args:
            name: the target; the caller does not hold its lock.
            undo: go back to the old main.
            pace: how fast to copy, and in which steps.
            patience: how hard to try to read failing blocks.

        Raises:
            Refused: another process copies it.
            DmRemapError: a step failed; the target is as its metadata says, and another call goes
                on from there.
        """
        memory.lock_memory()
        tools = replacing.Tools(
            self._mapper, self._freezer, self._guard.guarded, self._guard.end_freeze
        )
        copy = replacing.Replacing(
            self, tools, self._step, self._progress, pace, patience or Patience()
        )
        with self._locks.copying(name):
            return copy.run(name, undo)

    def successor(self, metadata: Metadata) -> Metadata:
        """The next generation, from this host and now, with nothing else changed."""
        return self._committer.successor(metadata)

    def commit_next(self, target: ActiveTarget, disks: Disks, new: Metadata) -> None:
        """Commit the next generation of a target whose devices are open."""
        self._committer.commit(target, disks.members, target.metadata, new)

    def finish_replacement(self, target: ActiveTarget, config: dict[str, Any]) -> None:
        """Commit the configuration after a replacement, and leave nothing of it in the kernel."""
        self._committer.commit_config(target, config)
        target = self.require(target.name)
        self._stack.clear_leftovers(target)
        target = self.require(target.name)
        if shim_of(target.metadata) == RAID_SHIM and target.shim is None:
            self._stack.insert_shim(target)

    def remap(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None = None,
        patience: Patience | None = None,
    ) -> RemapReport:
        """Move every chunk that ``ranges`` touch from main to a spare; the caller holds the lock.

        Chunks that are on a spare already are left alone.

        Args:
            name: the target.
            ranges: pairs of first sector and count on the target.
            expected_generation: refuse unless the metadata is at this generation.
            patience: how hard to try to read failing blocks.

        Raises:
            Refused: nothing was changed.
            DmRemapError: a step failed; the target is as its metadata says.
        """
        return self._by_plan(
            name,
            lambda target, generation: plan_remap(target, ranges, generation),
            ranges,
            expected_generation,
            patience or Patience(),
        )

    def return_to_main(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None = None,
        patience: Patience | None = None,
    ) -> RemapReport:
        """Move every chunk that ``ranges`` touch from its spare to main; the caller holds the lock.

        A chunk that has a sector which cannot be read, or whose place on main does not keep its
        data, stays where it is; the report says why. The arguments and errors are those of `remap`.
        """
        return self._by_plan(
            name,
            lambda target, generation: self.plan_return(target, ranges, generation),
            ranges,
            expected_generation,
            patience or Patience(),
            Route(to_main=True),
        )

    def plan_return(
        self,
        target: ActiveTarget,
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None = None,
    ) -> Plan:
        """Plan the return of chunks to main, but for those with sectors that cannot be read."""
        lost = extents.merge_sectors(self.lost_before(target, ranges))
        return plan_return(target, ranges, expected_generation, lost)

    def change_sectors(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        *,
        returned: bool,
        expected_generation: int | None = None,
        patience: Patience | None = None,
        files_seconds: float = 60,
        check: bool = False,
    ) -> RemapReport:
        """Remap or return chunks under the target's lock, and find out whom lost sectors belong to.

        Args:
            name: the target.
            ranges: pairs of first sector and count on the target.
            returned: back to main, otherwise to a spare.
            expected_generation: refuse unless the metadata is at this generation.
            patience: how hard to try to read failing blocks.
            files_seconds: how long to look for the files of lost sectors; 0 does not look.
            check: change nothing; the report says what would be done.

        Raises:
            Refused: nothing was changed.
            DmRemapError: a step failed; the target is as its metadata says.
        """
        with self.locked(name):
            if check:
                target = self.require(name)
                plan_for = self.plan_return if returned else plan_remap
                plan = plan_for(target, ranges, expected_generation)
                lost = self.lost_before(target, ranges)
                report = RemapReport(plan, staying(target, lost) if returned else [], lost)
            else:
                change = self.return_to_main if returned else self.remap
                report = change(name, ranges, expected_generation, patience)
        if files_seconds > 0:
            self.find_files(name, report, files_seconds)
        return report

    def _by_plan(
        self,
        name: str,
        plan_for: Callable[[ActiveTarget, int | None], Plan],
        ranges: Sequence[tuple[int, int]],
        expected_generation: int | None,
        patience: Patience,
        route: Route = TO_SPARES,
    ) -> RemapReport:
        begun = time.monotonic()
        target = self.require(name)
        first = plan_for(target, expected_generation)
        upkeep = plan_upkeep(target)
        self.apply(upkeep)
        memory.lock_memory()
        if upkeep.changes:
            target = self.require(name)
        plan = plan_for(target, None)
        lost_before = self.lost_before(target, ranges)
        report = self._carry_out(target, plan, patience, route)
        report.plan = replace(
            report.plan,
            before=first.before,
            actions=upkeep.actions + report.plan.actions,
            warnings=(*first.warnings, *report.plan.warnings),
        )
        report.lost_before = lost_before
        if route.to_main:
            report.chunks = sorted(
                [*report.chunks, *staying(target, lost_before)], key=lambda chunk: chunk.chunk
            )
        report.seconds = time.monotonic() - begun
        return report

    def _carry_out(
        self, target: ActiveTarget, plan: Plan, patience: Patience, route: Route
    ) -> RemapReport:
        chunks = [
            action.details["chunk"]
            for action in plan.actions
            if action.kind in ("remap_chunk", "return_chunk")
        ]
        if not chunks:
            return RemapReport(remap_actions(target, (), ()))
        self._freezer.check_names(target)
        with contextlib.ExitStack() as opened:
            disks = opened.enter_context(self._opener.opened(target, main_writable=route.to_main))
            events = opened.enter_context(self._mapper.events())
            opened.enter_context(self._guard.guarded(target, disks))
            moved = self._mover.move(target, disks, chunks, patience, events, route=route)
        if moved.metadata is not target.metadata:
            self.backup(moved.metadata)
        if route.to_main:
            done = return_actions(target, [c.chunk for c in moved.chunks if c.moved])
        else:
            done = remap_actions(target, moved.extents, moved.lost)
        return RemapReport(
            plan=replace(done, warnings=tuple(moved.left_out.values())),
            chunks=moved.chunks,
            salvage_seconds=moved.salvage_seconds,
            pause_seconds=moved.pause_seconds,
        )

    def find_files(self, name: str, report: RemapReport, timeout: float = 60) -> None:
        """Find out whom the lost sectors of a finished remap belonged to; never an error.

        Call it without the target's lock, because it may take long.

        Args:
            name: the target.
            report: its `files` are filled in.
            timeout: seconds after which it gives up.
        """
        report.files = files.owners(f"/dev/mapper/{check_name(name)}", report.lost, timeout)

    def cut_off(
        self, target: ActiveTarget, release: Callable[[], None] | None = None
    ) -> ActiveTarget:
        """Let I/O to chunks on lost spares fail above the hold; see `Hold.cut_off`."""
        return self._hold.cut_off(target, release)

    def drain(self, target: ActiveTarget) -> None:
        """Wait until nothing is in flight below the map, none of whose chunks is frozen."""
        self._hold.drain(target)

    def fail_held(self, target: ActiveTarget) -> None:
        """Let all I/O that waits fail, and hold what fails from now on."""
        self._hold.fail_held(target)

    def release(self, target: ActiveTarget) -> None:
        """Let held I/O go on, and hold what fails from now on."""
        self._hold.release(target)

    def opened(
        self, target: ActiveTarget, main_writable: bool = False
    ) -> AbstractContextManager[Disks]:
        """Open what a move reads and writes; see `Opener.opened`."""
        return self._opener.opened(target, main_writable)

    def open_main(self, target: ActiveTarget) -> OpenDevice:
        """Open main once more, for reading; see `Opener.open_main`."""
        return self._opener.open_main(target)

    def open_part(self, target: ActiveTarget, spare: int | None) -> OpenDevice:
        """Open main, or a spare's integrity device by its index, for reading."""
        return self._opener.open_part(target, spare)

    def moving(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        wanted: Wanted = all_of_them,
        release: Callable[[], None] | None = None,
        route: Route = TO_SPARES,
    ) -> Steps:
        """Move chunks, and stop while they are to be read; see `Mover.moving`."""
        return self._mover.moving(target, disks, chunks, patience, None, wanted, release, route)

    def move_held(
        self,
        target: ActiveTarget,
        disks: Disks,
        chunks: Sequence[int],
        patience: Patience,
        wanted: Wanted = all_of_them,
        release: Callable[[], None] | None = None,
    ) -> Moved:
        """Move chunks of a target whose path has failed; see `Mover.move_held`."""
        return self._mover.move_held(target, disks, chunks, patience, wanted, release)

    def backup(self, metadata: Metadata) -> None:
        """Keep the metadata on the host too; a backup that fails costs no remap."""
        try:
            self._backups.keep(metadata)
        except OSError as error:
            self._progress(f"no backup in {self._backups.folder}: {error}")
