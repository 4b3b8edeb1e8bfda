#!/usr/bin/python
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: target
short_description: Create, activate and remove targets that redirect bad sectors to spares
version_added: 0.1.0
author:
  - dm_remap.storage contributors (!UNKNOWN)
extends_documentation_fragment:
  - dm_remap.storage.attributes
description:
  - A target C(/dev/mapper/NAME) stands in front of a main disk and is as large as it.
    Chunks of the main that go bad are redirected to spares, live and under any filesystem.
  - Nothing but the application's own data is ever written to the main.
    A filesystem that is on it already stays as it is, and is mounted from the target from then on.
  - After a restart of the host the same task activates the target again from the metadata on its
    spares.
  - What is not safe is refused before anything is written; the message says what would be needed.
requirements:
  - Linux with device-mapper and its targets C(integrity), C(delay) and C(multipath)
  - libdevmapper on the managed host
options:
  name:
    description:
      - Name of the target, 1 to 96 of the characters C(A-Z a-z 0-9 . _ + -), the first one a
        letter or digit.
    type: str
    required: true
  main:
    description:
      - The device to protect, a disk, partition or logical volume that nothing uses.
      - If an active target has another main, the target is copied to this device while it is in
        use, and then the old main is free. The device must be at least as large as the target,
        have its logical block size, and be empty. The target keeps its size.
      - A copy that was interrupted goes on where it was. If the old main is given again before the
        copy has ended, the target goes back to it with all that was written meanwhile. Both disks
        are needed until then.
      - Required with O(state=present).
    type: path
  spares:
    description:
      - One to eight devices that receive remapped chunks, with the same logical block size as the
        main, of 20 MiB or more, and empty.
      - Required with O(state=present).
      - The spares of a target that is in use can be changed. Those that are not listed any more
        are emptied and removed, after new ones were added, as M(dm_remap.storage.spare) does.
      - With O(state=absent), devices from which an inactive target's metadata is removed.
    type: list
    elements: path
    default: []
  chunk_size:
    description:
      - The unit of remapping, a power of two from V(4K) to V(1M), and a multiple of the physical
        block size of main and spares. It cannot be changed later.
      - A new target gets V(64K) if this is not given.
    type: str
  on_error:
    description:
      - What happens to an I/O that meets a bad sector.
      - With V(hold) it waits until the daemon C(dm-remapd) has moved the chunk to a spare, and goes
        on there. The application sees an error only where data is lost, or if nothing heals the
        chunk within 120 seconds. Needs the role C(dm_remap.storage.host) on the host.
      - With V(fail) the error reaches the application, and the chunk is remapped afterwards.
      - Can be changed while the target is in use.
      - A new target gets V(hold) if this is not given.
    type: str
    choices: [hold, fail]
  shim:
    description:
      - A layer between the target and its main that turns every error into one that
        O(on_error=hold) can hold. Without it, medium errors of SCSI and NVMe disks reach the
        application once, and the next try finds the healed chunk.
      - V(raid) is a C(raid1) of one leg, which costs some throughput, see C(docs/data-path.md).
      - V(auto) takes V(raid) for SCSI and NVMe disks, and V(none) for all others.
      - Can be changed while the target is in use.
      - A new target gets V(none) if this is not given.
    type: str
    choices: [none, raid, auto]
  allocation:
    description:
      - Which spare gets the next chunk. Runs of chunks are kept together by each of them, and a
        chunk goes next to its remapped neighbour where there is room.
      - V(first_fit) fills the spares in their order, V(balanced) takes the one with the largest
        share of free chunks, and V(health) the one with the best score, never another one while
        that has room.
      - It can be changed at any time, and counts for chunks that are remapped from then on.
      - A new target gets V(first_fit) if this is not given, and an existing one keeps what it has.
    type: str
    choices: [first_fit, balanced, health]
  thresholds:
    description:
      - How full the spares may get before it is warned of, in whole percents of their chunks, bad
        ones included, from 1 to 100.
      - What is not given stays as it is.
    type: dict
    suboptions:
      warn:
        description:
          - From here on is warned. Not above O(thresholds.critical).
          - A new target gets V(80).
        type: int
      critical:
        description:
          - From here on the state is critical.
          - A new target gets V(95).
        type: int
  copy_rate:
    description:
      - How fast the target is copied to another O(main) at most, in bytes per second, such as
        V(50M).
      - V(0) sets no limit.
    type: str
    default: "0"
  migrate_from:
    description:
      - The spare of an out-of-tree kernel target C(dm-remap-v4) that had this O(main), to leave
        that target. The new target shows what the kernel target would show, remapped sectors
        included. See C(docs/kernel-v4.md) for what can be saved and what cannot.
      - It must be another device than the O(spares), and the kernel target must be removed first.
        Neither it nor the main is written to.
      - Only for a target that does not exist yet. The same task can be run again after an
        interruption, and does nothing once the target is migrated, even without the old spare.
    type: path
  migrate_pending:
    description:
      - What to do with remaps of O(migrate_from) that are marked as pending. The kernel target does
        not use a remap before it is started again, and does not note that it was, so nobody knows
        whether main or the old spare has the newer data. They are refused if this is not given.
      - With V(spare) their sectors come from the old spare, which is right if the kernel target was
        started again after the remaps were made, as after a restart of the host.
      - With V(main) they stay on the main, which is right if it was not.
      - With V(lost) they are lost sectors, which give errors until they are written.
    type: str
    choices: [main, spare, lost]
  migrate_unit:
    description:
      - How much each remap of O(migrate_from) stands for, such as V(4K). The kernel target sends
        I/O that begins at a remapped sector to its spare as a whole, so a filesystem's block size
        is right where only that filesystem used the target.
      - A multiple of the main's logical block size, which it is if this is not given.
    type: str
  wipe:
    description:
      - Allow spares, or a new O(main) of an active target, that hold a filesystem, a partition
        table or anything else, which is erased.
      - Remapped chunks of a target are not erased by this alone. If they are this target's own, the
        target is activated with them; if they are another's, the spare is refused.
    type: bool
    default: false
  discard_remaps:
    description:
      - With O(state=absent), remove the target although some of its data is on the spares only.
        That data is lost, and so is what was copied to a new main already.
      - With O(wipe=true), erase spares although remapped chunks of a target are on them.
      - Remove a spare that cannot be read although chunks are on it. Their sectors are lost.
    type: bool
    default: false
  degraded:
    description:
      - Activate a target from its metadata although spares of it are missing. They are left out of
        O(spares), or the paths there do not exist or cannot be read.
      - Chunks on a missing spare give errors when they are read or written; what the main has in
        their place is old and never shows. All else works.
      - Without this the task fails and says which spares are missing and how many remapped chunks
        are on each.
      - A missing spare that was in use after all others knows of chunks that these do not know of.
        If this host has committed such a generation, the task fails in any case. Otherwise nobody
        can tell, and such chunks have older data then; when the spare comes back, that is seen, and
        it is refused.
      - When a missing spare is there again, the same task gives its chunks back, also while the
        target is in use.
      - Of an active target, lost spares that are not in O(spares) stay in its configuration.
    type: bool
    default: false
  state:
    description:
      - V(present) creates the target, activates it, repairs what an interruption left, or copies
        it to another main.
      - V(absent) removes the target and every copy of its metadata from its spares. A spare that is
        missing meanwhile keeps its copies, and a warning says so; this host refuses to activate
        the target from it later.
    type: str
    choices: [present, absent]
    default: present
attributes:
  check_mode:
    description: Can run in C(check_mode) and return what would be done without doing it.
    support: full
  diff_mode:
    description: Returns the configuration and the device-mapper table before and after.
    support: full
  idempotent:
    description: A second run with the same options plans nothing and changes nothing.
    support: full
seealso:
  - module: dm_remap.storage.spare
  - module: dm_remap.storage.sectors
  - module: dm_remap.storage.info
"""

EXAMPLES = r"""
- name: Protect a disk with two spares
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_MAIN
    spares:
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_1
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_2

- name: See what would be done, without doing it
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_MAIN
    spares: [/dev/disk/by-id/ata-EXAMPLE_SPARE_1]
    chunk_size: 128K
  check_mode: true
  diff: true

- name: Hold the errors of an NVMe disk too, and see what that changes
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/nvme-EXAMPLE_MAIN
    spares: [/dev/disk/by-id/ata-EXAMPLE_SPARE_1]
    on_error: hold
    shim: auto
  diff: true

- name: Fill both spares evenly, and warn early
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_MAIN
    spares:
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_1
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_2
    allocation: balanced
    thresholds:
      warn: 60
      critical: 85

- name: Replace the main while the target is in use; afterwards the old disk can be taken out
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_NEW_MAIN
    spares:
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_1
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_2
    copy_rate: 50M
  async: 864000
  poll: 60

- name: Leave the kernel target dm-remap-v4, whose spare stays as it is
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_MAIN
    spares: [/dev/disk/by-id/ata-EXAMPLE_SPARE_1]
    migrate_from: /dev/disk/by-id/ata-EXAMPLE_OLD_SPARE
    migrate_pending: spare
    migrate_unit: 4K

- name: Activate a target in an emergency, with one of its spares missing
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_MAIN
    spares: [/dev/disk/by-id/ata-EXAMPLE_SPARE_1]
    degraded: true

- name: Use the missing spare again, which has been found; its chunks can be read again
  dm_remap.storage.target:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_MAIN
    spares:
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_1
      - /dev/disk/by-id/ata-EXAMPLE_SPARE_2

- name: Remove a target that has no remaps; the main is as it was
  dm_remap.storage.target:
    name: data
    state: absent
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample:
    - action: format_spare
      device: /dev/sdc
      chunks: 1023
    - action: create_target
      device: /dev/mapper/data
      main: /dev/sdb
msg:
  description: What became of a kernel target's data, and that its spare is not needed any more.
  returned: when a target was migrated
  type: str
target:
  description:
    - The target after the task, or as it is in check mode; empty while there is none.
    - The keys are those of RV(dm_remap.storage.info#module:targets).
  returned: always
  type: dict
  sample:
    name: data
    device: /dev/mapper/data
    generation: 1
    remapped_chunks: 0
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.configuration import request_of
from ..module_utils.engine import Engine
from ..module_utils.errors import DmRemapError, Refused, count_of
from ..module_utils.observing import request_seen
from ..module_utils.plan import REPLACE, UNDO, Plan
from ..module_utils.plan_removal import plan_absent
from ..module_utils.planner import plan_present
from ..module_utils.replacing import Pace
from ..module_utils.report import describe_migration, describe_target, diff_of
from ..module_utils.request import Request, Seen
from ..module_utils.sizes import bytes_of


def main() -> None:
    """Read the arguments, plan, carry out unless in check mode, and report."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "main": {"type": "path"},
            "spares": {"type": "list", "elements": "path", "default": []},
            "chunk_size": {"type": "str"},
            "on_error": {"type": "str", "choices": ["hold", "fail"]},
            "shim": {"type": "str", "choices": ["none", "raid", "auto"]},
            "allocation": {"type": "str", "choices": ["first_fit", "balanced", "health"]},
            "thresholds": {
                "type": "dict",
                "options": {"warn": {"type": "int"}, "critical": {"type": "int"}},
            },
            "copy_rate": {"type": "str", "default": "0"},
            "migrate_from": {"type": "path"},
            "migrate_pending": {"type": "str", "choices": ["main", "spare", "lost"]},
            "migrate_unit": {"type": "str"},
            "wipe": {"type": "bool", "default": False},
            "discard_remaps": {"type": "bool", "default": False},
            "degraded": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        required_if=[("state", "present", ("main", "spares"))],
        supports_check_mode=True,
    )
    try:
        run(module)
    except DmRemapError as error:
        module.fail_json(msg=str(error), device=error.device, remedy=error.remedy)


def run(module: AnsibleModule) -> None:
    """Carry the task out and end the module with its result."""
    name = module.params["name"]
    pace = pace_from(module)
    engine = Engine(guard=True)
    engine.check_host()
    # Two tasks at once could give one spare to two targets.
    with engine.locked_host(), engine.locked(name):
        if module.params["state"] == "present":
            request = request_from(module)
            plan = plan_present(request, request_seen(engine, request))
        else:
            plan = absence(engine, module)
        moved = [] if module.check_mode else engine.apply(plan)
        target = engine.observe(name)
    kinds = [action.kind for action in plan.actions]
    if not module.check_mode and (REPLACE in kinds or UNDO in kinds):
        # A copy takes hours, and locks the target in steps only.
        engine.replace_main(name, undo=UNDO in kinds, pace=pace)
        with engine.locked(name):
            target = engine.observe(name)
    for warning in plan.warnings:
        module.warn(warning)
    result = {}
    if plan.migration and not module.check_mode:
        result["msg"] = describe_migration(plan, moved)
    lost = [item for chunk in moved for item in chunk.lost]
    if lost:
        count = count_of(sum(count for _start, count in lost), "sector")
        module.warn(f"{name}: {count} could not be read and must be taken for lost")
    module.exit_json(
        changed=plan.changes,
        actions=plan.action_dicts(),
        diff=diff_of(plan),
        target=describe_target(target) if target else {},
        **result,
    )


def pace_from(module: AnsibleModule) -> Pace:
    """How fast to copy."""
    rate = module.params["copy_rate"]
    try:
        return Pace(rate=bytes_of(rate))
    except ValueError as error:
        raise Refused(
            f"copy_rate {rate!r} is not a number of bytes",
            device=module.params["name"],
            remedy="use a number such as 50M, or 0 for no limit",
        ) from error


def request_from(module: AnsibleModule) -> Request:
    """The target that the arguments ask for."""
    return request_of(module.params)


def absence(engine: Engine, module: AnsibleModule) -> Plan:
    """The plan that removes the target."""
    name = module.params["name"]
    seen: Seen = engine.see(name, None, module.params["spares"])
    return plan_absent(name, seen.target, seen, module.params["discard_remaps"])


if __name__ == "__main__":
    main()
