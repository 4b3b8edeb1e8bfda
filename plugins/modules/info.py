#!/usr/bin/python
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: info
short_description: Report targets, their tables, spares and metadata
version_added: 0.1.0
author:
  - dm_remap.storage contributors (!UNKNOWN)
extends_documentation_fragment:
  - dm_remap.storage.attributes
description:
  - Reports the active targets of a host with their main, spares, remapped chunks, lost sectors,
    metadata generation and device-mapper table.
  - A target whose metadata cannot be read is reported with the reason and does not hide the others.
options:
  name:
    description: Report only this target, which must be active.
    type: str
  discover:
    description:
      - Look at all block devices of the host too, and report which targets they make up, what each
        can be activated from, and why not. Nothing is changed.
      - It reads 28 KiB of each device that is none of ours, and more of our spares.
    type: bool
    default: false
attributes:
  check_mode:
    description: Changes nothing, so it runs the same in C(check_mode).
    support: full
  diff_mode:
    description: Changes nothing, so there is no difference to show.
    support: N/A
  idempotent:
    description: Never changes anything.
    support: full
seealso:
  - module: dm_remap.storage.assemble
  - module: dm_remap.storage.target
  - module: dm_remap.storage.sectors
"""

EXAMPLES = r"""
- name: Look at all targets
  dm_remap.storage.info:
  register: storage

- name: Show how full the spares of a target are
  dm_remap.storage.info:
    name: data
  register: storage

- name: See which targets the disks of a host make up, and why one is not activated
  dm_remap.storage.info:
    discover: true
  register: storage
"""

RETURN = r"""
targets:
  description: The active targets, by name in ascending order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the target.
      returned: always
      type: str
    device:
      description: The device to mount and use.
      returned: always
      type: str
    error:
      description:
        - Why the target cannot be described, for example because its metadata cannot be read.
          Then the keys below are missing.
        - If O(name) is given, the task fails instead.
      returned: when the target cannot be described
      type: str
      sample: >-
        /dev/mapper/data: is active without any spare; attach its spares and assemble it again
    devno:
      description: Device number, C(MAJOR:MINOR).
      returned: unless there is an RV(targets[].error)
      type: str
      sample: "253:1"
    uuid:
      description: The target's own identity, in its metadata.
      returned: unless there is an RV(targets[].error)
      type: str
      sample: 0b7c8d0e-0c5f-4f4e-9d55-2f0a5e9c1c11
    generation:
      description: Number of the state of the metadata; every change adds one.
      returned: unless there is an RV(targets[].error)
      type: int
    sectors:
      description: Size of the target in sectors of 512 bytes.
      returned: unless there is an RV(targets[].error)
      type: int
    chunk_size:
      description: The unit of remapping in bytes.
      returned: unless there is an RV(targets[].error)
      type: int
    on_error:
      description: What happens to an I/O that meets a bad sector, V(hold) or V(fail).
      returned: unless there is an RV(targets[].error)
      type: str
    shim:
      description: The layer that turns every error of the main into one that is held, or V(none).
      returned: unless there is an RV(targets[].error)
      type: str
    holding:
      description:
        - Whether failed I/O waits now. With RV(targets[].on_error=hold) it does not after the
          kernel's fail-safe has ended a wait, until the daemon or the module
          M(dm_remap.storage.target) restores it.
      returned: unless there is an RV(targets[].error)
      type: bool
    allocation:
      description: Which spare gets the next chunk, V(first_fit), V(balanced) or V(health).
      returned: unless there is an RV(targets[].error)
      type: str
    thresholds:
      description: From which share of used and bad chunks on is warned, in percent.
      returned: unless there is an RV(targets[].error)
      type: dict
      contains:
        warn:
          description: From here on the state of the pool is V(warn).
          type: int
        critical:
          description: From here on it is V(critical).
          type: int
    main:
      description: The protected device.
      returned: unless there is an RV(targets[].error)
      type: dict
      contains:
        path:
          description: The device's path now, or null if it is not there.
          type: str
        devno:
          description: Its device number now, or null if it is not there.
          type: str
        sectors:
          description: The target's size in sectors of 512 bytes, from the metadata.
          type: int
        device_sectors:
          description: The main's own size, which is larger than the target's where a main was
            replaced by a larger one.
          type: int
        logical_block:
          description: Its logical block size in bytes, from the metadata.
          type: int
        physical_block:
          description: Its physical block size in bytes, from the metadata.
          type: int
        serial:
          description: Its serial number, from the metadata; empty if it has none.
          type: str
        wwn:
          description: Its World Wide Name, from the metadata; empty if it has none.
          type: str
        model:
          description: Its model, from the metadata; empty if it has none.
          type: str
    replacing:
      description:
        - The disk that is replacing the main, and how far that is; null if none is.
        - Until it is at its end, the target's data is on both disks.
      returned: unless there is an RV(targets[].error)
      type: dict
      contains:
        path:
          description: The new main's path.
          type: str
        devno:
          description: Its device number, C(MAJOR:MINOR).
          type: str
        copied:
          description: Bytes from the start of the target that are on the new main.
          type: int
        total:
          description: Bytes of the target.
          type: int
        percent:
          description: The same as a percentage.
          type: float
    spares:
      description: The spares that can be used, by index.
      returned: unless there is an RV(targets[].error)
      type: list
      elements: dict
      contains:
        index:
          description: Position of the spare in the target's configuration, from 0.
          type: int
        path:
          description: The device's path.
          type: str
        devno:
          description: Its device number, C(MAJOR:MINOR).
          type: str
        uuid:
          description: The spare's own identity, in the metadata.
          type: str
        serial:
          description: Its serial number; empty if it has none.
          type: str
        wwn:
          description: Its World Wide Name; empty if it has none.
          type: str
        model:
          description: Its model; empty if it has none.
          type: str
        chunks:
          description: Number of chunks that it can hold.
          type: int
        free_chunks:
          description: Number of chunks that it can still take.
          type: int
        used_chunks:
          description: Number of chunks that it holds.
          type: int
        bad_chunks:
          description: Number of its chunks that are known to be bad, and hold nothing.
          type: int
        reserved_chunks:
          description: Number of chunks that a copy of the metadata takes, beside those above.
          type: int
        score:
          description: Its health from 0 to 100, 100 where nothing is known.
          type: float
        copies_damaged:
          description: Whether some of its copies of the metadata are damaged or cannot be read.
          type: bool
        stale:
          description: Whether its metadata is of an older generation than the target's.
          type: bool
    pool:
      description: The room on all spares that are there, in chunks.
      returned: unless there is an RV(targets[].error)
      type: dict
      contains:
        state:
          description: V(ok), V(warn), V(critical), or V(full) when no chunk is free.
          type: str
        filled_percent:
          description: Share of the chunks that are used or bad.
          type: float
        chunks:
          description: Number of chunks that the spares can hold, bad ones included.
          type: int
        free_chunks:
          description: Number of chunks that they can still take.
          type: int
        used_chunks:
          description: Number of chunks that they hold.
          type: int
        bad_chunks:
          description: Number of chunks that are known to be bad, and hold nothing.
          type: int
        reserved_chunks:
          description: Number of chunks that copies of the metadata take, beside those above.
          type: int
    degraded:
      description: Whether a spare cannot be used. All chunks that are not on it work.
      returned: unless there is an RV(targets[].error)
      type: bool
    lost_spares:
      description:
        - The spares that cannot be used, by index, and what of the target is unavailable by that.
        - M(dm_remap.storage.spare) removes such a spare.
      returned: unless there is an RV(targets[].error)
      type: list
      elements: dict
      contains:
        index:
          description: Position of the spare in the target's configuration, from 0.
          type: int
        path:
          description: The device's path, or null if it is gone.
          type: str
        uuid:
          description: The spare's own identity, in the metadata.
          type: str
        serial:
          description: Its serial number, from the metadata; empty if it has none.
          type: str
        wwn:
          description: Its World Wide Name, from the metadata; empty if it has none.
          type: str
        model:
          description: Its model, from the metadata; empty if it has none.
          type: str
        reason:
          description: What is wrong with it.
          type: str
        chunks:
          description: Number of the target's chunks that are on it.
          type: int
        unavailable:
          description: Sectors of the target that are on it and give errors.
          type: list
          elements: dict
          contains:
            start:
              description: First sector, in units of 512 bytes.
              type: int
            count:
              description: Number of sectors.
              type: int
    remapped_chunks:
      description: Number of chunks that are on spares.
      returned: unless there is an RV(targets[].error)
      type: int
    extents:
      description: Runs of remapped chunks, all numbers in chunks.
      returned: unless there is an RV(targets[].error)
      type: list
      elements: dict
      contains:
        logical:
          description: First chunk of the run on the target.
          type: int
        length:
          description: Number of chunks.
          type: int
        spare:
          description: Index of the spare that holds them.
          type: int
        physical:
          description: First chunk of the run on that spare.
          type: int
        flags:
          description: No flag is defined yet.
          type: int
    lost:
      description: Sectors of the target that no read could save when their chunk was remapped.
      returned: unless there is an RV(targets[].error)
      type: list
      elements: dict
      contains:
        start:
          description: First sector, in units of 512 bytes.
          type: int
        count:
          description: Number of sectors.
          type: int
    interrupted:
      description:
        - Whether a remap is going on, or one broke off and its chunks are still held. The next
          M(dm_remap.storage.target) or M(dm_remap.storage.sectors) task puts that right.
      returned: unless there is an RV(targets[].error)
      type: bool
    table:
      description:
        - The device-mapper table, with C(main) and C(spareN) in place of device numbers. Numbers
          are sectors of 512 bytes.
      returned: unless there is an RV(targets[].error)
      type: list
      elements: str
    warnings:
      description:
        - What is wrong with the spares and with the copies of the metadata, and how full the spares
          are.
      returned: unless there is an RV(targets[].error)
      type: list
      elements: str
  sample:
    - name: data
      device: /dev/mapper/data
      generation: 8
      remapped_chunks: 1
      pool:
        state: ok
        filled_percent: 0.1
        chunks: 848
        free_chunks: 847
        used_chunks: 1
        bad_chunks: 0
        reserved_chunks: 8
      lost: []
      table:
        - 0 123392 linear main 0
        - 123392 128 linear spare0 0
        - 123520 2097152 linear main 123520
discovery:
  description: What the devices of the host make up. C(docs/identity.md) lists all decisions.
  returned: with O(discover=true)
  type: dict
  contains:
    targets:
      description: The targets that any device tells of, by name in ascending order.
      type: list
      elements: dict
      contains:
        uuid:
          description: The target's own identity.
          type: str
        name:
          description: Its name; empty where nobody knows it.
          type: str
        state:
          description: One of V(complete), V(degraded), V(refused) and V(active).
          type: str
        decision:
          description: What can be done with it, and why, in a sentence.
          type: str
        generation:
          description: The generation of the metadata that counts; null where none could be chosen.
          type: int
        main:
          description: Path of its main; null if that is missing or not certain.
          type: str
        confidence:
          description: How certain it is that this is the main, 0 to 100; null without one.
          type: int
        new_main:
          description: Path of the device that replaces the main; null if none does.
          type: str
        spares:
          description: The spares that are there.
          type: list
          elements: dict
          contains:
            index:
              description: Position of the spare in the target's configuration, from 0.
              type: int
            path:
              description: The device.
              type: str
        missing:
          description: The spares that are not there.
          type: list
          elements: dict
          contains:
            index:
              description: Position of the spare in the target's configuration, from 0.
              type: int
            uuid:
              description: The spare's own identity, in the metadata.
              type: str
            identity:
              description: Model and serial number that are recorded of it.
              type: str
            chunks:
              description: Remapped chunks that are on it only.
              type: int
        stale:
          description: Paths of spares with an older generation.
          type: list
          elements: str
        retired:
          description: Paths of devices that are no spares of it any more.
          type: list
          elements: str
        damaged:
          description: Spares with damaged copies of the metadata.
          type: list
          elements: dict
          contains:
            path:
              description: The spare.
              type: str
            copies:
              description: Its damaged copies.
              type: list
              elements: dict
              contains:
                copy:
                  description: Number of the copy, 0 to 6.
                  type: int
                diagnosis:
                  description: What is wrong with it, as C(docs/format.md) describes.
                  type: str
        clones:
          description: Paths of devices with a copy of the content of its main or of a spare.
          type: list
          elements: str
        sides:
          description: After a split brain, the newest generation of each history.
          type: list
          elements: dict
          contains:
            generation:
              description: Its generation.
              type: int
            digest:
              description: What tells it from others of this number, in hexadecimal.
              type: str
            timestamp_ns:
              description: When it was committed, in nanoseconds since 1970.
              type: int
            host_id:
              description: The host that committed it.
              type: str
            devices:
              description: Paths of the spares that have it.
              type: list
              elements: str
        problems:
          description: What is not as it should be, what refuses first.
          type: list
          elements: dict
          contains: &problem
            code:
              description: What it is, for programs.
              type: str
            device:
              description: Path of a device, UUID of a spare, or empty.
              type: str
            message:
              description: What is wrong.
              type: str
            remedy:
              description: What to do.
              type: str
            refuses:
              description: Whether the target is not activated because of it.
              type: bool
    others:
      description: Problems with devices that belong to no target that is known.
      type: list
      elements: dict
      contains: *problem
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.engine import Engine
from ..module_utils.errors import DmRemapError
from ..module_utils.report import describe_each, describe_target


def main() -> None:
    """Observe and report."""
    module = AnsibleModule(
        argument_spec={"name": {"type": "str"}, "discover": {"type": "bool", "default": False}},
        supports_check_mode=True,
    )
    more = {}
    try:
        engine = Engine()
        engine.check_host()
        if module.params["name"] is not None:
            targets = [describe_target(engine.require(module.params["name"]))]
        else:
            targets = describe_each(engine.target_names(), engine.require)
        if module.params["discover"]:
            more["discovery"] = engine.discover().decide().to_dict()
    except DmRemapError as error:
        module.fail_json(msg=str(error), device=error.device, remedy=error.remedy)
    module.exit_json(changed=False, targets=targets, **more)


if __name__ == "__main__":
    main()
