# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run ansible-test sanity on the laid-out collection.

ansible-test keeps its environments under HOME, passes no pip setting from the environment on, and
downloads a script to install pip. So it gets a home of its own in the cache, with the user's pip
configuration in it, and where the download fails, a script that does the same with ensurepip.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import results
from lay_out_collection import BUILD, COPY

SANITY_SECONDS = 900
DOWNLOAD_SECONDS = 15
# Short, because ansible-test runs scripts whose first line may not exceed 127 characters.
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dm-remap-sanity"

GET_PIP = '''\
"""Install pip, and the packages named on the command line, without a download of pip itself."""
import subprocess
import sys

subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
wanted = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
subprocess.run([sys.executable, "-m", "pip", "install", *wanted], check=True)
'''


def pip_version() -> str:
    """Return the version of pip that this ansible-test wants."""
    code = (
        "from ansible_test._internal import python_requirements as r, host_configs as h\n"
        f"python = h.NativePythonConfig(version='{python_name()}', path='{sys.executable}')\n"
        "print(r.get_venv_packages(python)['pip'])\n"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return listed.stdout.strip()


def python_name() -> str:
    """Return this Python's version in ansible-test's form."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def provide_get_pip() -> None:
    """Put the script that installs pip where ansible-test keeps it, own or downloaded."""
    version = pip_version()
    cached = HOME / ".ansible" / "test" / "cache" / f"get_pip_{version.replace('.', '_')}.py"
    if cached.exists() and cached.read_text() != GET_PIP:
        return
    cached.parent.mkdir(parents=True, exist_ok=True)
    url = f"https://ci-files.testing.ansible.com/ansible-test/get-pip-{version}.py"
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:
            script = answer.read().decode()
    except OSError as error:
        print(f"{url}: {error}; using ensurepip instead")
        script = GET_PIP
    cached.write_text(script)


def provide_pip_configuration() -> None:
    """Give ansible-test's pip the indexes, proxies and certificates that the user's pip has."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {"quiet": "2"}
    for line in listed.splitlines():
        key, _equals, value = line.partition("=")
        section, _dot, name = key.rpartition(".")
        # What the environment says (listed first) wins over the configuration files.
        if section in (":env:", "global"):
            settings.setdefault(name, ast.literal_eval(value))
    lines = ["[global]"]
    lines += [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    path = HOME / ".config" / "pip" / "pip.conf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")


def split(outcome: results.Outcome) -> dict[str, results.Outcome]:
    """Return an outcome for each sanity test, or the whole when it broke off before the end."""
    ran = re.findall(r'^Running sanity test "([^"]+)"', outcome.output, re.MULTILINE)
    listed = outcome.output.partition("sanity test(s) listed below")[2].splitlines()[1:]
    failed = {line.split()[0] for line in listed if line.strip()}
    if not outcome.passed and not failed:
        return {"ansible-test sanity": outcome}
    return {name: results.Outcome(1 if name in failed else 0, "", 0.0) for name in [*ran, *failed]}


def main() -> int:
    """Run the sanity tests and write their outcome."""
    HOME.mkdir(parents=True, exist_ok=True)
    provide_get_pip()
    provide_pip_configuration()
    command = ["ansible-test", "sanity", "--color", "no", "--python", python_name(), "--junit"]
    environment = {**os.environ, "HOME": str(HOME)}
    outcome = results.run(command, SANITY_SECONDS, COPY, prefix="", environment=environment)
    path = BUILD / "results" / "sanity.xml"
    results.write(path, "sanity", split(outcome))
    print(results.read(path))
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    results.stop_on_signals()
    sys.exit(main())
