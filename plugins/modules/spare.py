#!/usr/bin/python
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: spare
short_description: Add, replace and remove spares of a target that is in use
version_added: 0.1.0
author:
  - dm_remap.storage contributors (!UNKNOWN)
extends_documentation_fragment:
  - dm_remap.storage.attributes
description:
  - Adds a spare to a target, replaces one by another, or removes one, while the target is in use.
  - The chunks of a spare that goes move to the other spares first. What can be read is saved, and
    sectors that no read could save are reported as lost. What was known to be lost stays so.
  - If the other spares have no room for all chunks, the task fails before anything is moved.
  - A spare that is gone or gives errors only takes down the chunks that are on it. It is removed
    with O(discard_remaps=true). Its chunks then read as errors until they are written; the main's
    old content never shows in their place.
  - A crash at any moment leaves every chunk where the metadata says, with its data. The same task
    continues afterwards.
options:
  name:
    description: Name of the target, which must be active.
    type: str
    required: true
  device:
    description:
      - The spare, a disk, partition or logical volume.
      - A new one must be as the module M(dm_remap.storage.target) wants its spares.
      - For a spare that is gone, the UUID that M(dm_remap.storage.info) shows.
    type: path
    required: true
  replaces:
    description:
      - With O(state=present), the spare that O(device) stands in for, by its path or UUID.
        Its chunks move to O(device) as long as there is room, and it is removed.
      - If it is no spare any more while O(device) is one, nothing is left to be done.
    type: path
  wipe:
    description:
      - Allow a new spare that holds a filesystem, a partition table or anything else, which is
        erased. Remapped chunks of another target are not erased by this alone.
    type: bool
    default: false
  discard_remaps:
    description:
      - Remove a spare that cannot be read although chunks are on it. Their sectors are lost.
      - With O(wipe=true), erase a new spare although remapped chunks of another target are on it.
    type: bool
    default: false
  state:
    description:
      - V(present) makes O(device) a spare. A lost spare of the target that is there again is used
        as it is, and its chunks can be read again.
      - V(absent) empties it, removes it, and erases the metadata on it.
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
  - module: dm_remap.storage.target
  - module: dm_remap.storage.sectors
  - module: dm_remap.storage.info
"""

EXAMPLES = r"""
- name: Add a spare
  dm_remap.storage.spare:
    name: data
    device: /dev/disk/by-id/ata-EXAMPLE_SPARE_2

- name: Replace a spare that begins to fail
  dm_remap.storage.spare:
    name: data
    device: /dev/disk/by-id/ata-EXAMPLE_SPARE_3
    replaces: /dev/disk/by-id/ata-EXAMPLE_SPARE_2

- name: Empty a spare and take it out
  dm_remap.storage.spare:
    name: data
    device: /dev/disk/by-id/ata-EXAMPLE_SPARE_1
    state: absent

- name: Give up a spare that is gone, and what was on it
  dm_remap.storage.spare:
    name: data
    device: 6e0c7a52-2f0e-4f0a-9d4a-8f6f0a1b2c3d
    state: absent
    discard_remaps: true
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample:
    - action: drain_spare
      device: /dev/sdc
      index: 0
      chunks: 12
      avoid: [0]
      prefer: []
      lost: []
    - action: remove_spare
      device: /dev/sdc
      index: 0
      generation: 9
emptied:
  description: What became of the chunks that had to leave a spare.
  returned: always
  type: dict
  contains:
    moved:
      description: Number of chunks that moved.
      type: int
    recovered:
      description: Number of their sectors whose data was saved.
      type: int
    lost:
      description: Sectors of the target that no read could save.
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
      description: Sectors that were lost before and still cannot be read, in the same form.
      type: list
      elements: dict
      contains:
        start:
          description: First sector, in units of 512 bytes.
          type: int
        count:
          description: Number of sectors.
          type: int
target:
  description:
    - The target after the task, or as it is in check mode.
    - The keys are those of RV(dm_remap.storage.info#module:targets).
  returned: always
  type: dict
  sample:
    name: data
    device: /dev/mapper/data
    generation: 9
    degraded: false
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.engine import Engine
from ..module_utils.errors import DmRemapError, count_of
from ..module_utils.plan_spares import SpareRequest, plan_spare_absent, plan_spare_present
from ..module_utils.report import describe_emptied, describe_target, diff_of


def main() -> None:
    """Read the arguments, plan, apply unless in check mode, and report."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "device": {"type": "path", "required": True},
            "replaces": {"type": "path"},
            "wipe": {"type": "bool", "default": False},
            "discard_remaps": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
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
    name, present = params["name"], params["state"] == "present"
    request = SpareRequest(
        name=name,
        device=params["device"],
        replaces=params["replaces"] if present else None,
        wipe=params["wipe"],
        discard_remaps=params["discard_remaps"],
    )
    engine = Engine(guard=True, progress=module.log)
    engine.check_host()
    # Two tasks at once could give one spare to two targets.
    with engine.locked_host(), engine.locked(name):
        seen = engine.see_spare(name, request.device, request.replaces, add=present)
        plan = plan_spare_present(request, seen) if present else plan_spare_absent(request, seen)
        moved = [] if module.check_mode else engine.apply(plan)
        target = engine.require(name)
    for warning in plan.warnings:
        module.warn(warning)
    emptied = describe_emptied(moved)
    lost = sum(item["count"] for item in emptied["lost"])
    if lost:
        module.warn(f"{name}: {count_of(lost, 'sector')} must be taken for lost")
    module.exit_json(
        changed=plan.changes,
        actions=plan.action_dicts(),
        diff=diff_of(plan),
        emptied=emptied,
        target=describe_target(target),
    )


if __name__ == "__main__":
    main()
