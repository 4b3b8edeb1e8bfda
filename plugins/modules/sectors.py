#!/usr/bin/python
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: sectors
short_description: Remap failing sectors of a target to a spare, or return them to the main
version_added: 0.1.0
author:
  - dm_remap.storage contributors (!UNKNOWN)
extends_documentation_fragment:
  - dm_remap.storage.attributes
description:
  - Moves every chunk that the given sectors touch from the main to a spare, while the target is in
    use. What can still be read is saved; sectors that no read could save are reported as lost.
  - Reading a lost sector gives an error until something writes it. Zeros or old data are never
    returned in its place.
  - Chunks that are on a spare already are left alone, so a second run changes nothing.
  - With O(state=returned) chunks go back to the main, if their places there prove good. The test is
    the chunk's own data, written to the main, flushed and read back twice. Nothing else is ever
    written there.
  - A crash at any moment leaves the old mapping or the new one, each with its data.
  - Which files the lost sectors belonged to is looked up afterwards, on ext2, ext3, ext4 and xfs,
    mounted or not, on the whole target or on partitions of it. See RV(lost_files).
options:
  name:
    description: Name of the target, which must be active.
    type: str
    required: true
  ranges:
    description: The failing sectors.
    type: list
    elements: dict
    required: true
    suboptions:
      start:
        description:
          - First sector on the target, in units of 512 bytes.
          - A multiple of 8 on a main with logical blocks of 4096 bytes.
        type: int
        required: true
      count:
        description:
          - Number of sectors.
          - A multiple of 8 on a main with logical blocks of 4096 bytes.
        type: int
        default: 1
  state:
    description:
      - With V(remapped) the chunks that O(ranges) touch are on a spare afterwards.
      - With V(returned) they are on the main, but for chunks that stay where they are. A chunk
        stays if one of its sectors cannot be read, or if its place on the main does not take and
        give back its data. RV(chunks[].reason) says why, and the task does not fail.
    type: str
    choices: [remapped, returned]
    default: remapped
  expected_generation:
    description:
      - Fail without a change unless the target's metadata is at this generation.
      - Guards a decision that was made on an older state of the target.
    type: int
  retries:
    description:
      - How often a block that cannot be read is tried again before it counts as lost, 0 or more.
    type: int
    default: 4
  salvage_seconds:
    description:
      - Time for reading one chunk, 0 or more. When it is over, no further retry is begun.
      - If it is over before every block was tried once, the task fails and changes nothing.
    type: float
    default: 600
  files_seconds:
    description:
      - Time for finding out which files lost sectors belonged to, 0 or more. What is not found out
        by then is unknown. With 0 nothing is looked up, and RV(lost_files) is empty.
      - Nothing waits for it but the task. A large filesystem without a reverse mapping is read
        through for each look-up.
    type: float
    default: 60
attributes:
  check_mode:
    description:
      - Can run in C(check_mode) and return which chunks would go where. What can be saved is not
        known before it is read.
    support: full
  diff_mode:
    description: Returns the configuration and the device-mapper table before and after.
    support: full
  idempotent:
    description: A second run with the same options plans nothing and changes nothing.
    support: full
seealso:
  - module: dm_remap.storage.target
  - module: dm_remap.storage.info
"""

EXAMPLES = r"""
- name: Remap a sector that the kernel reported
  dm_remap.storage.sectors:
    name: data
    ranges:
      - start: 123456
  register: remap

- name: Stop if data was lost
  ansible.builtin.assert:
    that: remap.lost | length == 0

- name: Take a chunk back to the main, whose cable was the culprit
  dm_remap.storage.sectors:
    name: data
    state: returned
    ranges:
      - start: 123456

- name: Name the files that lost data
  ansible.builtin.debug:
    msg: "{{ damaged | map(attribute='paths') | flatten }}"
  vars:
    damaged: "{{ remap.lost_files | selectattr('kind', 'equalto', 'file') }}"

- name: Remap two ranges, if nobody changed the target since it was looked at
  dm_remap.storage.sectors:
    name: data
    expected_generation: 7
    ranges:
      - start: 2048
        count: 64
      - start: 1048576
        count: 8
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample:
    - action: remap_chunk
      device: data
      chunk: 964
      start: 123392
      count: 128
      spare: 0
      spare_chunk: 0
generation:
  description: Generation of the target's metadata after the task, in check mode as it would be.
  returned: always
  type: int
  sample: 8
recovered:
  description: Number of sectors in the remapped chunks whose data was saved.
  returned: always
  type: int
  sample: 127
lost:
  description:
    - Sectors of the chunks that no read could save.
    - Of chunks that were remapped before this task, those that are still unreadable are named too.
      Each lost sector can be read again as soon as something has been written to it.
  returned: always
  type: list
  elements: dict
  contains:
    start:
      description: First sector, in units of 512 bytes.
      type: int
    count:
      description: Number of sectors.
      type: int
  sample:
    - start: 123456
      count: 1
lost_files:
  description:
    - Whom the sectors in RV(lost) belonged to, in check mode too. Together the entries cover all of
      them; a sector that a filesystem shares between files is in several.
    - What cannot be told for certain is V(unknown), with the reason, and the task warns.
  returned: always
  type: list
  elements: dict
  contains:
    start:
      description: First sector on the target, in units of 512 bytes.
      type: int
    count:
      description: Number of sectors.
      type: int
    kind:
      description:
        - V(file) for the data of a file, written or only reserved for it.
        - V(metadata) for what the filesystem needs itself, or keeps of one file or directory, which
          is then named.
        - V(free) for what nothing uses.
        - V(unknown) for what could not be found out.
      type: str
    paths:
      description:
        - All names that are known, hard links too. Where the filesystem is mounted they begin with
          the mount point, otherwise they are relative to the root of the filesystem.
        - A backslash is doubled, and each byte that cannot be printed is written as C(\xNN).
      type: list
      elements: str
    inode:
      description: Number of the inode, V(0) where there is none.
      type: int
    filesystem:
      description: V(ext2), V(ext3), V(ext4), V(xfs), or empty.
      type: str
    partition:
      description: Number of the partition on the target, V(0) where there is none.
      type: int
    reason:
      description: Why the kind is V(unknown), or why a file has no path. Otherwise empty.
      type: str
  sample:
    - start: 123456
      count: 1
      kind: file
      paths:
        - /srv/archive/2024/report.pdf
      inode: 4711
      filesystem: ext4
      partition: 0
      reason: ""
chunks:
  description:
    - The chunks that were moved, with what became of their sectors.
    - With O(state=returned), chunks that stay where they are too.
  returned: always
  type: list
  elements: dict
  contains:
    chunk:
      description: Number of the chunk on the target, from 0.
      type: int
    start:
      description: Its first sector on the target, in units of 512 bytes.
      type: int
    count:
      description: Number of its sectors.
      type: int
    spare:
      description: Index of the spare that it is on now, or null on the main.
      type: int
    spare_chunk:
      description: Number of the chunk on that spare, from 0, or null on the main.
      type: int
    origin:
      description: Index of the spare that it was on before, or null for the main.
      type: int
    moved:
      description: Whether the chunk has moved.
      type: bool
    reason:
      description: Why it has not, or empty.
      type: str
    recovered_first_read:
      description: Number of sectors that the first read saved.
      type: int
    recovered_on_retry:
      description: Number of sectors that a later read saved.
      type: int
    lost:
      description: Sectors of the target that no read could save, in the form of RV(lost).
      type: list
      elements: dict
      contains:
        start:
          description: First sector, in units of 512 bytes.
          type: int
        count:
          description: Number of sectors.
          type: int
    lost_before:
      description: Sectors that were lost before and still cannot be read, in the form of RV(lost).
      type: list
      elements: dict
      contains:
        start:
          description: First sector, in units of 512 bytes.
          type: int
        count:
          description: Number of sectors.
          type: int
  sample:
    - chunk: 964
      start: 123392
      count: 128
      spare: 0
      spare_chunk: 0
      origin: null
      moved: true
      reason: ""
      lost_before: []
      recovered_first_read: 127
      recovered_on_retry: 0
      lost:
        - start: 123456
          count: 1
pause_seconds:
  description: How long I/O to the chunks had to wait.
  returned: always
  type: float
  sample: 0.011
salvage_seconds:
  description: How long reading the main and writing the spare took, which is part of the pause.
  returned: always
  type: float
  sample: 0.4
seconds:
  description: Duration of the whole remap.
  returned: always
  type: float
  sample: 0.5
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.engine import Engine
from ..module_utils.errors import DmRemapError
from ..module_utils.report import describe_remap, diff_of, warnings_of_remap
from ..module_utils.salvage import Patience


def main() -> None:
    """Read the arguments, plan, remap unless in check mode, and report."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "ranges": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "start": {"type": "int", "required": True},
                    "count": {"type": "int", "default": 1},
                },
            },
            "state": {
                "type": "str",
                "choices": ["remapped", "returned"],
                "default": "remapped",
            },
            "expected_generation": {"type": "int"},
            "retries": {"type": "int", "default": 4},
            "salvage_seconds": {"type": "float", "default": 600.0},
            "files_seconds": {"type": "float", "default": 60.0},
        },
        supports_check_mode=True,
    )
    try:
        run(module)
    except DmRemapError as error:
        module.fail_json(msg=str(error), device=error.device, remedy=error.remedy)


def run(module: AnsibleModule) -> None:
    """Carry the task out and end the module with its result."""
    params = module.params
    name = params["name"]
    ranges = [(item["start"], item["count"]) for item in params["ranges"]]
    patience = Patience(retries=params["retries"], budget=params["salvage_seconds"])
    engine = Engine(guard=True)
    engine.check_host()
    report = engine.change_sectors(
        name,
        ranges,
        returned=params["state"] == "returned",
        expected_generation=params["expected_generation"],
        patience=patience,
        files_seconds=params["files_seconds"],
        check=module.check_mode,
    )
    for warning in warnings_of_remap(name, report):
        module.warn(warning)
    module.exit_json(
        changed=report.plan.changes,
        actions=report.plan.action_dicts(),
        diff=diff_of(report.plan),
        **describe_remap(report),
    )


if __name__ == "__main__":
    main()
