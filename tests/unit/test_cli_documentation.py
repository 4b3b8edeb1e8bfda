# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Completion and manual pages: made from the parsers, complete, and without complaints."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dm_remap.cli import documentation, installation
from dm_remap.cli.documentation import completion, leaves, manual
from dm_remap.cli.framework import EXIT_TEXTS, parser_of
from dm_remap.cli.installation import install, outdated
from dm_remap.cli.programs import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles" / "host"


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def candidates(program: str, *words: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last of the words."""
    script = (
        completion(PROGRAMS[program])
        + f"COMP_WORDS=({program} {' '.join(map(quoted, words))})\n"
        + f"COMP_CWORD={len(words)}\n"
        + f"_{program.replace('-', '_')}\n"
        + 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-u", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    assert done.stderr == ""
    return sorted(line for line in done.stdout.splitlines() if line)


def quoted(word: str) -> str:
    return f"'{word}'"


@pytest.mark.parametrize("program", PROGRAMS)
def test_bash_offers_every_command_and_option(program: str) -> None:
    for words, parser in leaves(parser_of(PROGRAMS[program])).items():
        parts = words.split()
        assert set(candidates(program, *parts, "-")) == options_of(parser)
        for depth, part in enumerate(parts):
            assert part in candidates(program, *parts[:depth], "")
            assert part in candidates(program, *parts[:depth], part[:1])


def test_bash_offers_what_values_are(tmp_path: Path) -> None:
    (tmp_path / "a dump.json").touch()
    (tmp_path / "sdb").touch()
    files = ["a dump.json", "sdb"]
    metadata = ("dm-remap", "metadata")
    assert candidates(*metadata, "check", "", folder=tmp_path) == files
    assert candidates(*metadata, "restore", "--from", "a", folder=tmp_path) == files[:1]
    assert candidates(*metadata, "restore", "sdb", "--spare", "", folder=tmp_path) == []
    assert candidates("dm-remap-validate", "--config", "", folder=tmp_path) == files
    # A name that is a command's does not lead astray.
    assert "--retries" in candidates("dm-remap", "remap", "status", "--ret", folder=tmp_path)
    assert candidates("dm-remap", "none", "", folder=tmp_path) != files


def test_bash_offers_active_targets_only(tmp_path: Path) -> None:
    devices = {
        "dm-0": ("DMREMAP-" + "0" * 32, "data"),
        "dm-1": ("DMREMAP-" + "0" * 32 + "-spare0", "data-spare0"),
        "dm-2": ("LVM-" + "x" * 64, "vg-root"),
        "dm-3": ("DMREMAP-" + "f" * 32, "logs"),
    }
    for name, (uuid, label) in devices.items():
        (tmp_path / name / "dm").mkdir(parents=True)
        (tmp_path / name / "dm" / "uuid").write_text(uuid + "\n")
        (tmp_path / name / "dm" / "name").write_text(label + "\n")
    text = completion(PROGRAMS["dm-remap"]).replace("/sys/block/", f"{tmp_path}/")
    script = text + "COMP_WORDS=(dm-remap status '')\nCOMP_CWORD=2\n_dm_remap\necho ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("data logs\n", "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_completion_is_good_shell(program: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"],
        input=completion(PROGRAMS[program]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


def plain(page: str) -> str:
    """A manual page's words without roff."""
    text = re.sub(r"\\f[BIR]|\\&", "", page).replace("\\-", "-").replace("\\(aq", "'")
    return text.replace("\\e", "\\")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_manual_page_has_everything(program: str) -> None:
    page = plain(manual(PROGRAMS[program]))
    for words, parser in leaves(parser_of(PROGRAMS[program])).items():
        assert f"{program} {words}".strip() in page
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            assert action.help
            about = action.help % {"default": action.default}
            assert about[:1].upper() + about[1:] + "." in page
            for name in action.option_strings:
                assert name in page
    for command in PROGRAMS[program].commands:
        assert f"{command.help}." in page
        for paragraph in command.description:
            assert paragraph in page or not command.name
        for line, about in command.examples:
            assert line in page
            assert about in page
    for code, text in EXIT_TEXTS.items():
        assert f"\n{int(code)}\n{text}\n" in page


@pytest.mark.skipif(not shutil.which("man"), reason="needs man")
@pytest.mark.parametrize("program", PROGRAMS)
def test_man_shows_a_page_without_warnings(program: str, tmp_path: Path) -> None:
    page = tmp_path / f"{program}.8"
    page.write_text(manual(PROGRAMS[program]))
    done = subprocess.run(
        ["man", "--warnings=w", "--local-file", str(page)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANPAGER": "cat"},
    )
    assert done.stderr == ""
    assert "EXIT STATUS" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_text_cannot_be_a_request() -> None:
    assert documentation._roff(".TH x") == "\\&.TH x"
    assert documentation._roff("'x\\fB-") == "\\(aqx\\efB\\-"


# Installation


def test_installing_twice_writes_once(tmp_path: Path) -> None:
    wanted = sorted(installation.files())
    assert len(wanted) == 3 * len(PROGRAMS)
    assert sorted(outdated(str(tmp_path))) == wanted
    assert not list(tmp_path.iterdir())
    assert sorted(install(str(tmp_path))) == wanted
    assert install(str(tmp_path)) == outdated(str(tmp_path)) == []
    manual_page = "/usr/share/man/man8/dm-remap.8"
    page = tmp_path / manual_page.lstrip("/")
    assert page.stat().st_mode & 0o777 == 0o644
    command = tmp_path / "usr/sbin/dm-remap"
    assert command.stat().st_mode & 0o777 == 0o755
    command.chmod(0o644)
    assert outdated(str(tmp_path)) == install(str(tmp_path)) == ["/usr/sbin/dm-remap"]
    assert command.stat().st_mode & 0o777 == 0o755
    page.write_bytes(b"\xff")
    assert outdated(str(tmp_path)) == install(str(tmp_path)) == [manual_page]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(wanted)


def test_what_the_role_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    all_files = 3 * len(PROGRAMS)
    for arguments, files in ((["--check"], all_files), ([], all_files), (["--check"], 0), ([], 0)):
        assert installation.main([*arguments, "--root", str(tmp_path)]) == 0
        assert len(json.loads(capsys.readouterr().out)["files"]) == files


def test_the_role_runs_the_installation() -> None:
    values = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())
    assert values["__host_installation"][-1] == "dm_remap.cli.installation"


def test_the_role_s_variables_are_documented() -> None:
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    specs = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text())
    assert set(defaults) == set(specs["argument_specs"]["main"]["options"])
    text = (ROLE / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in defaults)
    assert "python3-yaml" in defaults["host_packages"]
