# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tools that run the tests must notice what fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import check_links
import lay_out_collection
import results
import run_molecule
import sanity

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


def outcome(status: int | None, output: str = "") -> results.Outcome:
    return results.Outcome(status, output, 0.1)


def test_a_command_that_fails_is_reported_with_its_output(tmp_path: Path) -> None:
    ran = results.run([PYTHON, "-c", "print('why'); raise SystemExit(3)"], 60, tmp_path)
    assert (ran.status, ran.output, ran.passed) == (3, "why\n", False)


def test_a_command_that_hangs_is_ended_and_has_not_passed(tmp_path: Path) -> None:
    ran = results.run([PYTHON, "-c", "import signal; signal.pause()"], 1, tmp_path)
    assert ran.status is None
    assert not ran.passed
    assert "stopped" in ran.output


def test_counts_survive_being_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "part.xml"
    results.write(path, "part", {"good": outcome(0), "bad": outcome(1), "late": outcome(None)})
    assert str(results.read(path)) == "1 passed, 2 failed"


def test_counts_of_pytest_are_read(tmp_path: Path) -> None:
    path = tmp_path / "part.xml"
    path.write_text(
        "<testsuites><testsuite><testcase/><testcase><skipped/></testcase>"
        "<testcase classname='t' name='a'><failure message='one\n two'/></testcase>"
        "<testcase classname='t' name='b'><error/></testcase></testsuite></testsuites>"
    )
    assert str(results.read(path)) == "1 passed, 2 failed, 1 skipped"
    assert results.failures(path) == ["t::a: one two", "t::b: "]


@pytest.mark.parametrize("content", [None, "", "<testsuite>"])
def test_no_whole_report_counts_nothing(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "part.xml"
    if content is not None:
        path.write_text(content)
    assert results.read(path) == results.Counts()
    assert results.failures(path) == []


SANITY = 'Running sanity test "pep8"\nRunning sanity test "pylint"\n'


def test_sanity_tests_are_counted_one_by_one() -> None:
    failed = (
        SANITY + "FATAL: The 1 sanity test(s) listed below (out of 2) failed. See above.\npylint\n"
    )
    parts = sanity.split(outcome(1, failed))
    assert {name: part.passed for name, part in parts.items()} == {"pep8": True, "pylint": False}


def test_sanity_that_broke_off_has_failed() -> None:
    parts = sanity.split(outcome(1, SANITY))
    assert not all(part.passed for part in parts.values())


MOLECULE = "default > create: Executed: Successful\ntarget > converge: Executed: Successful\n"


@pytest.mark.parametrize(("status", "passed"), [(0, 2), (1, 2), (None, 2)])
def test_molecule_steps_are_counted_one_by_one(status: int | None, passed: int) -> None:
    parts = run_molecule.split(outcome(status, MOLECULE))
    assert sum(part.passed for part in parts.values()) == passed
    assert all(part.passed for part in parts.values()) == (status == 0)


@pytest.mark.parametrize("status", [0, 1])
def test_molecule_without_a_report_shows_its_own_outcome(status: int) -> None:
    parts = run_molecule.split(outcome(status))
    assert [part.status for part in parts.values()] == [status]


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](there.md)", 0),
        ("[a](there.md#the-words-it-has)", 0),
        ("[a](there.md#words)", 1),
        ("[a](missing.md)", 1),
        ("[a](#own-part)\n## Own part", 0),
        ("[a](#other)\n## Own part", 1),
        ("[a](https://example.org/missing.md)", 0),
        ("`[a](missing.md)`", 0),
        ("```\n[a](missing.md)\n```", 0),
        ("[a]: missing.md", 1),
    ],
)
def test_links(tmp_path: Path, text: str, broken: int) -> None:
    (tmp_path / "there.md").write_text("# There\n\n## The `words` it has\n")
    page = tmp_path / "page.md"
    page.write_text(text)
    assert len(check_links.broken_links(page, tmp_path)) == broken


@pytest.mark.parametrize(("shipped", "status"), [(["page.md", "there.md"], 0), (["page.md"], 1)])
def test_links_to_what_does_not_ship(tmp_path: Path, shipped: list[str], status: int) -> None:
    (tmp_path / "there.md").touch()
    (tmp_path / "page.md").write_text("[a](there.md)")
    with tarfile.open(tmp_path / "artifact", "w") as artifact:
        for name in shipped:
            artifact.add(tmp_path / name, name)
    assert check_links.main([str(tmp_path / "artifact")]) == status


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without git, with what the tools leave in it."""
    root = tmp_path / "root"
    (root / ".build").mkdir(parents=True)
    monkeypatch.setattr(lay_out_collection, "ROOT", root)
    monkeypatch.setattr(lay_out_collection, "COPY", root / ".build" / "copy")
    monkeypatch.setattr(lay_out_collection, "MANIFEST", root / ".build" / "manifest")
    shutil.copy(ROOT / ".gitignore", root)
    for name in (".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "tests/output"):
        (root / name).mkdir(parents=True)
        (root / name / "left").touch()
    # A link, as for a second clone that uses the first one's.
    (root / ".venv").symlink_to(tmp_path)
    return root


def test_an_unpacked_archive_is_all_source(root: Path) -> None:
    (root / "below").mkdir()
    (root / "below" / "file").touch()
    assert lay_out_collection.source_files() == [".gitignore", "below/file"]


def test_git_works_in_a_clone_of_another_user(root: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    # Git's own tests play another owner in this way.
    other = {name: value for name, value in os.environ.items() if not name.startswith("GIT_CONFIG")}
    other["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"
    list_files = 'git -C "$0" ls-files --others --exclude-standard'

    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", script, str(root)]
        return subprocess.run(
            command, cwd=ROOT, env=other, capture_output=True, text=True, check=False
        )

    assert "dubious ownership" in run(list_files).stderr
    assert run(f". tools/environment.sh && {list_files}").stdout.split() == [".gitignore"]


def test_the_copy_follows_the_sources(root: Path) -> None:
    copy = root / ".build" / "copy"
    (root / "kept").write_text("old")
    (root / "dropped").write_text("gone soon")
    lay_out_collection.lay_out()
    (copy / "left by a tool").write_text("stays")
    (root / "kept").write_text("newer")
    (root / "dropped").unlink()
    lay_out_collection.lay_out()
    laid_out = {"kept", "left by a tool", ".git", ".gitignore"}
    assert {path.name for path in copy.iterdir()} == laid_out
    assert (copy / "kept").read_text() == "newer"


def test_what_the_tests_leave_in_the_copy_is_ignored_there(root: Path) -> None:
    (root / "tests" / "test").touch()
    lay_out_collection.lay_out()
    copy = root / ".build" / "copy"
    (copy / "tests" / "output").mkdir()
    (copy / "tests" / "output" / "left").touch()
    # As reuse asks.
    command = "git ls-files --exclude-standard --ignored --others --directory --no-empty-directory"
    ignored = subprocess.run(command.split(), cwd=copy, check=True, capture_output=True, text=True)
    assert ignored.stdout.split() == ["tests/output/"]
    # The copy's own list does not hide what an archive has.
    assert lay_out_collection.source_files() == [".gitignore", "tests/test"]


GROUPS = {path.stem.partition("-")[2]: path for path in ROOT.glob("requirements/debian-*.txt")}
STUBS = {
    "ldconfig": "echo '\tlibmagic.so.1 (libc6,x86-64) => /lib/libmagic.so.1'",
    # The packages' names tell nothing.
    "dpkg-query": "exit 1",
    "apt-get": 'echo "apt-get $*"',
    "sudo": 'exec "$@"',
    **dict.fromkeys(
        "git mmdebstrap mke2fs ssh qemu-system-x86_64 qemu-img newuidmap shellcheck".split(), ""
    ),
}


def install_packages(folder: Path, *groups: str, **changed: str) -> str:
    """Run the tool on a machine whose programs are stubs; returns what apt-get was asked for."""
    folder.mkdir()
    for name, script in {**STUBS, **changed}.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(
        [ROOT / "tools" / "install_packages", *groups],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return "\n".join(re.findall("apt-get install.*", ran.stdout))


@pytest.mark.parametrize("group", ["python", "lint"])
def test_what_is_there_under_another_name_is_not_installed(tmp_path: Path, group: str) -> None:
    assert install_packages(tmp_path / "bin", group) == ""


def test_what_is_missing_is_installed_by_its_name(tmp_path: Path) -> None:
    asked = install_packages(tmp_path / "bin", "python", ldconfig="")
    assert asked.split()[-1] == "libmagic1"
    assert "git" not in asked


def test_every_package_is_known(tmp_path: Path) -> None:
    install_packages(tmp_path / "bin", *GROUPS)
