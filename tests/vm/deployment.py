# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Installs the collection in a guest with its own role."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

from tests.lab import Machine

ROOT = Path(__file__).resolve().parents[2]
COLLECTIONS = ROOT / ".build"
# Of the services; the one that assembles has tests of its own.
NEEDED = ("dm-remap-healer.service", "dm-remapd.service")

# Asks the daemon from inside the guest; curl is not there.
CLIENT = """
import json, ssl, sys, urllib.error, urllib.request
token = open("/etc/dm-remap/token").read().strip()
request = urllib.request.Request("https://localhost:9741" + sys.argv[1])
if sys.argv[2:] != ["anonymous"]:
    request.add_header("Authorization", "Bearer " + token)
context = ssl.create_default_context(cafile="/etc/dm-remap/tls/ca.crt")
try:
    answer = urllib.request.urlopen(request, context=context, timeout=120)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps({"status": answer.status, "body": answer.read().decode()}))
"""

# Reads or writes sectors past the page cache, several times, and prints the last error's name.
ACCESS = """
import errno, mmap, os, sys
path, sector, count, action, times = sys.argv[1:]
handle = os.open(path, os.O_RDWR | os.O_DIRECT)
memory = mmap.mmap(-1, int(count) * 512)
result = "ok"
for _ in range(int(times)):
    try:
        {"read": os.preadv, "write": os.pwritev}[action](handle, [memory], int(sector) * 512)
    except OSError as error:
        result = errno.errorcode[error.errno]
print(result)
"""

_deployed: weakref.WeakSet[Machine] = weakref.WeakSet()


def deploy(lab: Machine, directory: Path) -> None:
    """Install the daemon and the tools with the collection's own role."""
    variables = {
        **lab.inventory(),
        "host_daemon_names": ["localhost"],
        "host_daemon_address": "127.0.0.1",
        "host_controller_directory": "",
    }
    (directory / "hosts.json").write_text(json.dumps({"all": {"hosts": {"guest": variables}}}))
    play = [{"hosts": "all", "gather_facts": False, "roles": ["dm_remap.storage.host"]}]
    (directory / "play.json").write_text(json.dumps(play))
    done = subprocess.run(
        ["ansible-playbook", "-i", "hosts.json", "play.json"],
        cwd=directory,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lab.write_file("/root/client.py", CLIENT)
    lab.write_file("/root/access.py", ACCESS)
    # A power cut would take it away again.
    lab.run("sync")
    _deployed.add(lab)


def ensure_deployed(lab: Machine, directory: Path) -> None:
    """Boot the guest, and install and start the daemon unless that was done before."""
    if not lab.running:
        lab.start()
    if lab in _deployed:
        # The lab stops them where it cleans the guest.
        lab.run(["systemctl", "start", *NEEDED], timeout=180)
    else:
        deploy(lab, directory)
