# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copy the collection to where Ansible looks for it: .build/ansible_collections/dm_remap/storage.

A copy rather than a link: ansible-test insists on that path, and asks git for the files, so the
copy is a git repository of its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".build"
COPY = BUILD / "ansible_collections" / "dm_remap" / "storage"
MANIFEST = BUILD / "laid-out-files"


def source_files() -> list[str]:
    """Return the project's files, relative to its root: what .gitignore does not leave out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    environment = dict(os.environ)
    if not (ROOT / ".git").exists():
        # An unpacked archive: the copy's repository, without its index, knows no file yet.
        make_repository()
        environment["GIT_DIR"] = str(COPY / ".git")
        environment["GIT_WORK_TREE"] = str(ROOT)
        environment["GIT_INDEX_FILE"] = str(BUILD / "no-index")
    listed = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True
    ).stdout
    names = os.fsdecode(listed).split("\0")
    return sorted({name for name in names if name and os.path.lexists(ROOT / name)})


def make_repository() -> None:
    """Make the copy a git repository of its own, once."""
    if not (COPY / ".git").exists():
        COPY.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "init", "--quiet", str(COPY)], check=True)


def is_same(source: Path, copy: Path) -> bool:
    """Tell whether the copy has the source's size, time and mode."""
    try:
        one, other = source.lstat(), copy.lstat()
    except FileNotFoundError:
        return False
    return (one.st_size, one.st_mtime_ns, one.st_mode) == (
        other.st_size,
        other.st_mtime_ns,
        other.st_mode,
    )


def lay_out() -> None:
    """Make the copy equal to the sources; what tools left beside it stays."""
    make_repository()
    files = source_files()
    for name in files:
        source, copy = ROOT / name, COPY / name
        if is_same(source, copy):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(copy.name + ".partial")
        shutil.copy2(source, partial, follow_symlinks=False)
        os.replace(partial, copy)
    before = MANIFEST.read_text().splitlines() if MANIFEST.exists() else []
    for name in set(before) - set(files):
        (COPY / name).unlink(missing_ok=True)
    MANIFEST.write_text("\n".join(files) + "\n")
    # In a folder without any known file git does not name the ignored ones, which reuse asks for.
    subprocess.run(["git", "-C", str(COPY), "add", "--all"], check=True)


def main() -> None:
    """Lay the collection out, one process at a time."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "lay-out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lay_out()


if __name__ == "__main__":
    main()
