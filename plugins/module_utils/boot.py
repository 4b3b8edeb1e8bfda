# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a target that was found is assembled without being asked for (pure).

What it is assembled from is decided by `discovery` and `assembly`. Here is decided whether to do it
now, to wait for more disks, or to give up. docs/boot.md has the table of cases.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from .configuration import ALLOWED, Assembly
from .discovery import State, TargetFound
from .fingerprint import PROOFS, of_entry


class Step(enum.Enum):
    """What is done about a target."""

    LEAVE = "leave"
    WAIT = "wait"
    ASSEMBLE = "assemble"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Situation:
    """A target at a moment.

    Args:
        found: what its devices make up.
        policy: how it is to be assembled.
        known: the host has used it before, or its configuration names it.
        witness: what the host knows of generations and removals can be read.
        backup: there is a backup of it among that, and no other host has used it since.
        newest: the newest generation that the host remembers without its backups; 0 for none.
        waited: seconds since its time began.
        doubts: a sentence for each of its devices that is not to be used yet.
        spent: it was active with these very devices, or they were tried in vain.
    """

    found: TargetFound
    policy: Assembly
    known: bool = True
    witness: bool = True
    waited: float = 0.0
    doubts: tuple[str, ...] = ()
    spent: bool = False
    backup: bool = True
    newest: int = 0


@dataclass(frozen=True)
class Decision:
    """What is done about a target, and why.

    Args:
        step: what.
        reason: a sentence without a full stop.
        remedy: what the operator can do, or "".
        degraded: assemble it without the spares that are missing.
        left: seconds until the next decision, where nothing happens before.
    """

    step: Step
    reason: str
    remedy: str = ""
    degraded: bool = False
    left: float | None = None


def decide(now: Situation) -> Decision:
    """Decide what is done about a target."""
    found, policy = now.found, now.policy
    if found.state is State.ACTIVE:
        return Decision(Step.LEAVE, "is active")
    if any(problem.code == "removed" for problem in found.problems):
        return Decision(Step.LEAVE, found.decision)
    if not policy.auto:
        return Decision(Step.LEAVE, "is not to be assembled by itself (assemble.auto is false)")
    if now.spent:
        return Decision(
            Step.LEAVE,
            "was active or tried with these disks since the service began, so they are left alone",
            f"run dm-remap-reassemble {found.name or found.uuid} when it is to be active again",
        )
    if not now.known and now.witness:
        return Decision(
            Step.LEAVE,
            "was never used on this host, and may be in use on another one",
            f"run dm-remap-reassemble {found.name or found.uuid} if it belongs here",
        )
    return _of_a_target_of_ours(now)


def _of_a_target_of_ours(now: Situation) -> Decision:
    """The decision where nothing but the disks and the time counts."""
    found, policy = now.found, now.policy
    refused = next((problem for problem in found.problems if problem.refuses), None)
    remedy = refused.remedy if refused else ""
    if now.doubts:
        return _wait(now, f"waits, because {now.doubts[0]}", "attach what stands above that device")
    if found.state is State.REFUSED:
        return _wait(now, found.decision, remedy)
    generation = found.metadata.generation if found.metadata else now.newest
    if generation < now.newest:
        # All spares that an old generation tells of may be there, and none of those in use now.
        text = f"carries generation {generation}, but this host has used generation {now.newest}"
        return _wait(now, text, "attach the spare with the newer one")
    copied = _lost_its_proof(found)
    if copied:
        return _wait(
            now,
            f"{copied} claims to be a spare, but does not show the serial number or WWN that is "
            "recorded of that; it may be a copy with older data",
            f"attach the spare itself; or, if that is it, run dm-remap-reassemble {found.name} "
            f"--use {copied}",
        )
    if found.missing:
        text = f"{found.decision}, which is {policy.degraded}"
        named = ", ".join(f"{spare.index} ({spare.identity})" for spare in found.missing)
        remedy = (
            f"attach spare {named}; or allow it by assemble.degraded, see docs/configuration.md"
        )
        if now.waited < policy.timeout or policy.degraded != ALLOWED:
            return _wait(now, text, remedy)
        if not (now.witness and now.backup):
            # A missing spare may have been the only one in use, and only the backups would tell.
            remedy += "; if no spare was in use after the others, run "
            remedy += f"dm-remap-reassemble {found.name} --degraded allowed"
            return _wait(now, f"{text}, but no backup on this host can be read that tells", remedy)
        return Decision(Step.ASSEMBLE, f"{text} after {policy.timeout} s", degraded=True)
    if not now.witness:
        text = "waits for this host's backups, which tell of generations and removals"
        late = _wait(now, text, "mount the file system that they are on")
        if late.step is Step.WAIT or not now.known:
            return late
        return Decision(Step.ASSEMBLE, f"{found.decision}; this host's backups could not be read")
    if any(problem.code == "unproved_spare" for problem in found.problems):
        # The spare itself, whose copy this may be, can still appear.
        late = _wait(now, "waits for disks that could prove that a spare is a clone", "")
        if late.step is Step.WAIT:
            return late
    return Decision(Step.ASSEMBLE, found.decision)


def _lost_its_proof(found: TargetFound) -> str:
    """Path of a spare that nothing proves although there was a proof when it was recorded, or "".

    An image of a spare is all that the spare was, but for that.
    """
    doubtful = {p.device for p in found.problems if p.code == "unproved_spare"}
    for index, info in found.spares.items():
        if info.path in doubtful and found.metadata:
            recorded = of_entry(found.metadata.config["spares"][index])
            if any(getattr(recorded, name) for name in PROOFS):
                return info.path
    return ""


def _wait(now: Situation, reason: str, remedy: str) -> Decision:
    left = now.policy.timeout - now.waited
    if left > 0:
        return Decision(Step.WAIT, reason, remedy, left=left)
    return Decision(Step.GIVE_UP, reason, remedy)


class Clocks:
    """How long each target was waited for, and which devices were its when it was used.

    Args:
        start: seconds of the clock when the host began to be watched.
    """

    def __init__(self, start: float) -> None:
        self._start = start
        self._began: dict[uuid.UUID, float] = {}
        self._seen: dict[uuid.UUID, frozenset[str]] = {}
        self._spent: dict[uuid.UUID, frozenset[str]] = {}

    def waited(
        self,
        target: uuid.UUID,
        devices: Collection[str],
        expected: bool,
        timeout: float,
        now: float,
    ) -> float:
        """Seconds since a target's time began.

        That is the start for a target which the host expects, else when it was first seen. If its
        time is over, a disk that was never seen before lets it begin anew: somebody is at work.

        Args:
            target: the target's UUID.
            devices: attachments of its devices that are there.
            expected: the host expects it.
            timeout: seconds until its time is over.
            now: the clock.
        """
        fresh = frozenset(devices) - self._seen.get(target, frozenset())
        began = self._began.setdefault(target, self._start if expected else now)
        if fresh and now - began >= timeout:
            self._began[target] = now
        self._seen[target] = self._seen.get(target, frozenset()) | frozenset(devices)
        return now - self._began[target]

    def spend(self, target: uuid.UUID, devices: Collection[str]) -> None:
        """Note that a target was active with these attachments, or that they were tried in vain."""
        self._spent[target] = self._spent.get(target, frozenset()) | frozenset(devices)

    def spent(self, target: uuid.UUID, devices: Collection[str]) -> bool:
        """Whether none of these attachments is new since then."""
        return bool(devices) and frozenset(devices) <= self._spent.get(target, frozenset())
