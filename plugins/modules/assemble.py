#!/usr/bin/python
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: assemble
short_description: Find targets by their spares and activate them
version_added: 0.1.0
author:
  - dm_remap.storage contributors (!UNKNOWN)
extends_documentation_fragment:
  - dm_remap.storage.attributes
description:
  - Looks at all block devices of a host, finds the targets that their metadata tells of, and
    activates them. Names, ports and order of the devices play no part, so it works after disks
    were moved to another host, too.
  - Each spare carries the whole description of its target, so any one of them is enough to know it.
    Damaged copies of the metadata are repaired, and spares that are behind are brought up to date.
  - What is activated is decided as C(docs/identity.md) says. It is refused where it is not certain
    that a device is the main, where a spare is missing, after a split brain, and where a disk was
    cloned and nothing tells the clone from the disk. Each reason is returned.
  - A target that is active already is left as it is.
  - Each target is activated for itself. One that is refused does not keep the others from being
    activated; the task fails at its end.
options:
  name:
    description:
      - Name or UUID of the target to assemble. One of this and O(auto) is required.
      - The task fails if no device tells of such a target.
    type: str
  auto:
    description:
      - Assemble all targets that are found.
      - The task fails if any of them is refused, after all others were assembled. A target that
        was removed from this host on purpose, while a spare of it was missing, is left alone with
        a warning and is no failure.
    type: bool
    default: false
  safe_mode:
    description:
      - Activate a target only if the hardware of its main proves it to be the main, or O(main)
        names it.
      - With V(false) a main without proof is taken, which is one without serial number, WWN and
        volume, such as a virtio disk that was given none. It must be the only device that can be
        it, with the recorded size and block size and nothing that contradicts, and nothing else may
        speak against the target.
      - Nothing else is let through by V(false). In particular no clone, no split brain, no main of
        another size, and no generation that is older than one which this host has committed.
    type: bool
    default: true
  degraded:
    description:
      - Whether a target may be activated although spares of it are missing.
      - With V(allowed), chunks that are on a missing spare give errors; what the main has in their
        place is old and never shows. See O(dm_remap.storage.target#module:degraded) for what
        nobody can know then.
    type: str
    choices: [never, allowed]
    default: never
  main:
    description:
      - The device that is the main of the target O(name), whatever its serial number is. Use it
        for a main that has none, and for a copy of a main that died.
      - Size and block size must be those of the main. It is recorded as the main from then on.
      - It cannot be given while the main is being replaced.
    type: path
  use:
    description:
      - A spare of the target O(name) whose history counts after a split brain, also against the
        backup of this host. What only other spares know is lost, and they count as missing.
      - A clone that is named here is the spare from now on, and is recorded as that. Other devices
        that claim to be this spare are left out. It must be as large as the spare was, or larger,
        and have its block size.
    type: path
attributes:
  check_mode:
    description: Can run in C(check_mode) and return what would be done without doing it.
    support: full
  diff_mode:
    description: Returns the configuration and the device-mapper table before and after.
    support: full
  idempotent:
    description: Active targets are left as they are, so a second run changes nothing.
    support: full
seealso:
  - module: dm_remap.storage.info
  - module: dm_remap.storage.target
"""

EXAMPLES = r"""
- name: Assemble everything on a host that the disks were moved to
  dm_remap.storage.assemble:
    auto: true

- name: See what would be done, without doing it
  dm_remap.storage.assemble:
    auto: true
  check_mode: true
  diff: true

- name: Activate a target in an emergency, with one of its spares missing
  dm_remap.storage.assemble:
    name: data
    degraded: allowed

- name: Decide after a split brain for the side that this spare is on
  dm_remap.storage.assemble:
    name: data
    use: /dev/disk/by-id/ata-EXAMPLE_SPARE_1
    degraded: allowed

- name: Use a copy of the main, which died
  dm_remap.storage.assemble:
    name: data
    main: /dev/disk/by-id/ata-EXAMPLE_COPY
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample:
    - action: activate_spare
      device: /dev/sdc
    - action: create_target
      device: /dev/mapper/data
      main: /dev/sdb
targets:
  description:
    - The targets that were asked for, by name in ascending order.
    - Each has the keys of RV(dm_remap.storage.info#module:discovery.targets), as they were before,
      and these.
  returned: unless nothing tells of what was asked for
  type: list
  elements: dict
  contains:
    result:
      description:
        - V(assembled) if it was activated, or would be in check mode.
        - V(active) if it was active already.
        - V(refused) if it was refused before anything was changed.
        - V(failed) if a step failed.
        - V(removed) if it was removed from this host on purpose, and O(auto) left it alone.
      type: str
    actions:
      description: What was done to this target.
      type: list
      elements: dict
    repaired:
      description: Spares whose copies of the metadata were written anew.
      type: list
      elements: dict
      contains:
        path:
          description: The spare.
          type: str
        stale:
          description: Whether it had an older generation.
          type: bool
        copies:
          description: Damaged copies.
          type: list
          elements: dict
          contains:
            copy:
              description: Number of the copy, 0 to 6.
              type: int
            diagnosis:
              description: What was wrong with it, as C(docs/format.md) describes.
              type: str
        whole:
          description: Whether all of its copies are right now; true in check mode.
          type: bool
    error:
      description: Why it was refused, or what failed; null otherwise.
      type: str
  sample:
    - name: data
      state: complete
      decision: can be activated from generation 8 with its main and all spares
      result: assembled
others:
  description: See RV(dm_remap.storage.info#module:discovery.others).
  returned: unless nothing tells of what was asked for
  type: list
  elements: dict
  sample: []
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.assembly import Report, assemble
from ..module_utils.configuration import ALLOWED, DEGRADED, NEVER
from ..module_utils.engine import Engine
from ..module_utils.errors import DmRemapError
from ..module_utils.order import Order
from ..module_utils.report import diff_of


def main() -> None:
    """Read the arguments, assemble unless in check mode, and report."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str"},
            "auto": {"type": "bool", "default": False},
            "safe_mode": {"type": "bool", "default": True},
            "degraded": {"type": "str", "choices": list(DEGRADED), "default": NEVER},
            "main": {"type": "path"},
            "use": {"type": "path"},
        },
        required_by={"main": ("name",), "use": ("name",)},
        supports_check_mode=True,
    )
    if bool(module.params["name"]) == module.params["auto"]:
        module.fail_json(msg="give either the name of a target, or auto: true for all")
    try:
        engine = Engine()
        engine.check_host()
        report = assemble(engine, order_of(module.params), module.check_mode)
    except DmRemapError as error:
        module.fail_json(msg=str(error), device=error.device, remedy=error.remedy)
    for warning in report.warnings:
        module.warn(warning)
    result = result_of(report)
    if report.missed:
        module.fail_json(msg=report.message, **result)
    module.exit_json(**result)


def order_of(params: dict) -> Order:
    """What the arguments ask for."""
    return Order(
        name=params["name"] or "",
        safe_mode=params["safe_mode"],
        degraded=params["degraded"] == ALLOWED,
        main=params["main"] or "",
        use=params["use"] or "",
    )


def result_of(report: Report) -> dict:
    """What the task returns."""
    plans = [target.plan for target in report.targets if target.plan]
    return {
        "changed": report.changed,
        "actions": report.actions,
        "diff": [part for plan in plans if plan.changes for part in diff_of(plan)],
        **report.to_dict(),
    }


if __name__ == "__main__":
    main()
