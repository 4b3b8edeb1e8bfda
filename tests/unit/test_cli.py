# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The command-line tools on a kernel in memory: what they print, and how they end."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dm_remap.cli import framework, installation
from dm_remap.cli.framework import EXIT_TEXTS, Command, Exit, Host, Program, Result, run
from dm_remap.cli.programs import PROGRAMS
from dm_remap.cli.text import clean, pairs, table, time_text
from dm_remap.events import Draft, Origin
from dm_remap.journal import Journal
from dm_remap.report import describe_target
from tests.unit.cli_scene import Desk, Terminal, be_root_at_a_known_time, settled
from tests.unit.test_engine import NAME, make_scene

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "plugins" / "module_utils"


@pytest.fixture(autouse=True)
def root_at_a_known_time(monkeypatch: pytest.MonkeyPatch) -> None:
    be_root_at_a_known_time(monkeypatch)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A target with two spares."""
    scene = make_scene(tmp_path, 2)
    for index, spare in enumerate(scene.spares):
        spare.serial = f"S{index}"
    scene.create()
    return Desk(scene)


# Text


def test_a_table() -> None:
    rows = [["a", 5, None], ["long name", 123, "x"]]
    assert table(["NAME", "COUNT", "WHY"], rows) == [
        "NAME       COUNT  WHY",
        "a              5  -",
        "long name    123  x",
    ]
    assert table(["A", "B"], []) == ["A  B"]


def test_pairs() -> None:
    assert pairs({"a": 1, "long": "", "none": None}) == ["a     1", "long  -", "none  -"]


def test_nothing_can_steer_a_terminal() -> None:
    assert clean("a\x1b[31m\nb\x9b\u202e\udcff") == "a\\x1b[31m\\nb\\x9b\\u202e\\udcff"
    assert clean("größe ✓") == "größe ✓"
    assert "\x1b" not in "".join(table(["A"], [["\x1b"]]) + pairs({"a": "\x1b"}))


def test_times_that_no_clock_shows() -> None:
    assert time_text(0) == "1970-01-01T00:00:00Z"
    assert time_text(2**64 - 1) == "2554-07-21T23:34:33Z"
    assert time_text(2**90) == f"{2**90} ns"


# Status


def test_status_of_all(desk: Desk) -> None:
    done = desk.run("dm-remap status")
    assert done.out == (
        "NAME     STATE  MAIN       SIZE      POOL     SPARES  REMAPPED  LOST  GENERATION\n"
        "guarded  ok     /dev/main  98.5 KiB  ok 0.0%       2         0     0           1\n"
    )
    assert (done.code, done.err) == (0, "")


def test_status_of_one(desk: Desk) -> None:
    desk.scene.spoil(41)
    desk.scene.remap((40, 16))
    done = desk.run(f"dm-remap status {NAME}")
    assert settled(done.out) == (
        "name         guarded\n"
        "state        ok\n"
        "device       /dev/mapper/guarded (253:7)\n"
        "uuid         UUID\n"
        "size         98.5 KiB (197 sectors)\n"
        "generation   2\n"
        "chunk        4.0 KiB\n"
        "on error     fail\n"
        "shim         none\n"
        "allocation   first_fit\n"
        "thresholds   warn 80%, critical 95%\n"
        "main         /dev/main (Fake, serial-main)\n"
        "replaced by  -\n"
        "pool         ok, 0.0% of 6656 chunks, 6654 free\n"
        "remapped     2 chunks in 1 run\n"
        "lost         41+1\n"
        "\n"
        "SPARE  DEVICE       SERIAL  CHUNKS  USED  FREE  BAD  SCORE  METADATA\n"
        "    0  /dev/spare0  S0        3328     2  3326    0  100.0  ok\n"
        "    1  /dev/spare1  S1        3328     0  3328    0  100.0  ok\n"
    )
    assert (done.code, done.err) == (0, "")


def test_status_as_json_is_what_the_module_info_returns(desk: Desk) -> None:
    expected = [describe_target(desk.scene.engine().require(NAME))]
    for line in ("dm-remap status --json", f"dm-remap status --json {NAME}"):
        done = desk.run(line)
        assert done.json == {"schema": 1, "exit_code": 0, "targets": expected, "warnings": []}


def test_status_without_targets(tmp_path: Path) -> None:
    done = Desk(make_scene(tmp_path)).run("dm-remap status")
    assert (done.code, done.out) == (0, "no active targets\n")


def break_copy(desk: Desk) -> None:
    desk.scene.spares[0].fill(0, bytes(4096))


def lose_spare(desk: Desk) -> None:
    desk.scene.spares[1].dead = True


def hide_all(desk: Desk) -> None:
    for spare in desk.scene.spares:
        spare.dead = True


@pytest.mark.parametrize(
    ("harm", "state", "warning"),
    [
        (break_copy, "damaged copies", ""),
        (lose_spare, "degraded", "spare 1"),
        (hide_all, "error", "no valid copy"),
    ],
)
def test_what_is_not_in_order_ends_with_4(
    desk: Desk, harm: Callable[[Desk], None], state: str, warning: str
) -> None:
    harm(desk)
    done = desk.run("dm-remap status")
    assert done.code == Exit.FOUND == 4
    assert done.out.splitlines()[1].split("  ")[1].strip() == state
    assert warning in done.err
    answer = desk.run("dm-remap status --json").json
    assert answer["exit_code"] == 4
    assert answer["targets"][0]["name"] == NAME


# Remap and return


def test_a_dry_run_says_what_a_run_does(desk: Desk) -> None:
    desk.scene.spoil(41)
    line = f"dm-remap remap {NAME} 40+16 41 --files-seconds 0"
    planned = desk.run(f"{line} --dry-run")
    assert planned.out == (
        "would be done:\n"
        "  remap_chunk guarded chunk=5 start=40 count=8 spare=0 spare_chunk=0\n"
        "  remap_chunk guarded chunk=6 start=48 count=8 spare=0 spare_chunk=1\n"
        "  commit_metadata guarded generation=2\n"
    )
    assert (planned.code, desk.logged, desk.scene.generation()) == (0, [], 1)
    dry = desk.run(f"{line} --dry-run --json").json
    done = desk.run(f"{line} --json")
    assert done.json["actions"] == dry["actions"]
    assert (dry["dry_run"], done.json["dry_run"]) == (True, False)
    assert desk.logged[0] == "remap guarded sectors 40+16, 41+1"
    assert desk.scene.generation() == 2


def test_a_remap_that_loses_nothing(desk: Desk) -> None:
    done = desk.run(f"dm-remap remap {NAME} 40 --files-seconds 0")
    assert settled(done.out) == (
        "CHUNK  SECTORS  FROM  TO       RECOVERED  LOST\n"
        "    5  40+8     main  spare 0          8  -\n"
        "generation 2; I/O to the chunks waited N ms\n"
    )
    assert (done.code, done.err) == (0, "")
    again = desk.run(f"dm-remap remap {NAME} 40 --files-seconds 0")
    assert (again.code, again.out) == (0, "nothing was to do; generation 2\n")
    none = desk.run(f"dm-remap remap {NAME} 40 --files-seconds 0 --dry-run")
    assert (none.code, none.out) == (0, "nothing would be done\n")


def test_lost_sectors_and_chunks_that_stay_end_with_4(desk: Desk) -> None:
    desk.scene.spoil(41)
    done = desk.run(f"dm-remap remap {NAME} 40+16 --files-seconds 0")
    assert done.code == 4
    assert "    5  40+8     main  spare 0          7  41+1\n" in done.out
    assert done.err == (
        "dm-remap remap: guarded: 1 sector could not be read and must be taken for lost\n"
    )
    back = desk.run(f"dm-remap return {NAME} 40+16 --files-seconds 0")
    assert back.code == 4
    assert settled(back.out) == (
        "CHUNK  SECTORS  FROM     TO     RECOVERED  LOST\n"
        "    5  40+8     spare 0  stays          0  -\n"
        "    6  48+8     spare 0  main           8  -\n"
        "generation 3; I/O to the chunks waited N ms\n"
    )
    assert "chunk 5 stays on spare 0" in back.err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("nope 1", 3, "nope: there is no active target of that name; create or activate it"),
        (f"{NAME} 197", 3, "sectors 197+1 are not on the target, which has 197 sectors"),
        (f"{NAME} 1+0", 3, "sectors 1+0 are not on the target"),
        (f"{NAME} 1 --expected-generation 7", 3, "generation"),
        ("a/b 1", 3, "not a valid target name"),
        (f"{NAME} -1", 2, "'-1' is not START or START+COUNT"),
        (f"{NAME} 1-5", 2, "'1-5' is not START or START+COUNT in sectors"),
        (f"{NAME} 1+", 2, "'1+' is not START"),
        (f"{NAME} ٣", 2, "is not START"),
        (NAME, 2, "arguments are required: RANGE"),
        (f"{NAME} 1 --retries -1", 2, "invalid number value: '-1'"),
        (f"{NAME} 1 --salvage-seconds nan", 2, "invalid number of seconds value: 'nan'"),
        (f"{NAME} 1 --dry", 2, "unrecognized arguments: --dry"),
    ],
)
@pytest.mark.parametrize("command", ["remap", "return"])
def test_bad_input_changes_nothing(
    desk: Desk, command: str, arguments: str, code: int, text: str
) -> None:
    done = desk.run(f"dm-remap {command} {arguments}")
    assert (done.code, done.out) == (code, "")
    assert text in done.err
    assert desk.scene.generation() == 1


# History


def test_history_of_an_active_target(desk: Desk) -> None:
    desk.scene.remap((40, 16))
    desk.scene.return_to_main((40, 8))
    done = desk.run(f"dm-remap history {NAME}")
    assert settled(done.out) == (
        "GENERATION  TIME                  REMAPPED  LOST  DIGEST            BACKUP\n"
        "         3  2023-11-14T22:13:20Z         1     0  DIGEST----------  yes\n"
        "         2  2023-11-14T22:13:20Z         2     0  DIGEST----------  yes\n"
        "         1  2023-11-14T22:13:20Z         0     0  DIGEST----------  yes\n"
    )
    assert done.code == 0
    backups = desk.folder / "backup"
    (folder,) = backups.iterdir()
    files = sorted(folder.iterdir())
    files[0].unlink()
    files[1].write_bytes(b"damaged")
    shown = desk.run(f"dm-remap history {NAME} --json").json["generations"]
    assert [(item["generation"], item["backup"]) for item in shown] == [
        (3, "yes"),
        (2, "damaged"),
        (1, "no"),
    ]
    assert [item["remapped_chunks"] for item in shown] == [1, None, None]
    assert all(len(item["digest"]) == 16 for item in shown)


def test_history_of_an_inactive_target(desk: Desk) -> None:
    active = desk.run(f"dm-remap history {NAME} --json").json
    desk.scene.app.flush(desk.scene.kernel)
    desk.scene.kernel.cut_power(desk.scene.kernel.volatile())
    for name in (NAME, active["uuid"], active["uuid"].upper()):
        found = desk.run(f"dm-remap history {name} --json")
        assert found.code == 0
        assert found.json == {**active, "active": False}
    gone = desk.run("dm-remap history other")
    assert gone.code == 3
    assert "no backup of that name" in gone.err


def test_two_targets_of_one_name_are_told_apart(desk: Desk, tmp_path: Path) -> None:
    other = make_scene(tmp_path / "other")
    other.create()
    (folder,) = (tmp_path / "other" / "backup").iterdir()
    folder.rename(desk.folder / "backup" / folder.name)
    desk.scene.kernel.cut_power(desk.scene.kernel.volatile())
    done = desk.run(f"dm-remap history {NAME}")
    assert done.code == 3
    assert "several targets had this name; use one of" in done.err
    assert folder.name in done.err
    assert desk.run(f"dm-remap history {folder.name}").code == 0


def test_history_shows_the_newest_events_of_the_target(desk: Desk) -> None:
    origin = Origin("host", uuid.UUID(int=1), "boot")
    journal = Journal(str(desk.folder / "journal.db"), origin, clock=time.time_ns)
    # A name in a message must not make it an event of that target.
    other = Draft("overrun", '"target":"guarded"', target="guarded2")
    drafts = [Draft("sector_error", f"number {n}\x1b", target=NAME) for n in range(5)]
    journal.append([*drafts, other, Draft("overrun", "of the host")])
    for close in (lambda: None, journal.close):
        close()
        done = desk.run(f"dm-remap history {NAME} --events 2")
        assert done.out.splitlines()[-3:] == [
            "EVENT  TIME                  SEVERITY  TYPE          MESSAGE",
            "    4  2023-11-14T22:13:20Z  error     sector_error  number 3\\x1b",
            "    5  2023-11-14T22:13:20Z  error     sector_error  number 4\\x1b",
        ]
    assert desk.run(f"dm-remap history {NAME} --events 0 --json").json["events"] == []
    assert len(desk.run(f"dm-remap history {NAME} --json").json["events"]) == 5


def test_a_damaged_journal_does_not_hide_the_generations(desk: Desk) -> None:
    (desk.folder / "journal.db").write_bytes(b"no database at all" * 100)
    done = desk.run(f"dm-remap history {NAME}")
    assert done.code == 4
    assert "         1  " in done.out
    assert "the journal is damaged" in done.err
    assert (desk.folder / "journal.db").read_bytes() == b"no database at all" * 100


# Validate


def write_configuration(desk: Desk, text: str) -> str:
    path = desk.folder / "config.yaml"
    path.write_text(text)
    return str(path)


IN_PLACE = """\
targets:
  - name: guarded
    main: /dev/main
    spares: [/dev/spare0, /dev/spare1]
    chunk_size: 4K
    on_error: fail
"""


def test_validate_plans_what_the_module_would(desk: Desk) -> None:
    disks = desk.scene.kernel
    for name in ("new", "other"):
        disks.add_disk(name, desk.scene.spares[0].sectors)
    path = write_configuration(
        desk,
        IN_PLACE
        + "  - {name: more, main: /dev/other, spares: [/dev/new], on_error: fail, chunk_size: 4K}\n"
        + "  - {name: gone, main: /dev/q, spares: [/dev/z], assemble: {auto: no}}\n",
    )
    done = desk.run(f"dm-remap-validate --config {path}")
    assert done.out == (
        f"{path}: no faults, 3 targets\n"
        "\n"
        "TARGET   LINE  STATE     ASSEMBLE  DEGRADED  TIMEOUT\n"
        "guarded     2  in place  yes       never     60 s\n"
        "more        7  to do     yes       never     60 s\n"
        "gone        8  refused   no        never     60 s\n"
        "\n"
        "more:\n"
        "  format_spare /dev/new chunks=3328\n"
        "  activate_spare /dev/new name=more-spare0\n"
        "  commit_metadata more generation=1\n"
        "  create_target /dev/mapper/more main=/dev/other\n"
        "\n"
        "gone:\n"
        "  /dev/q: no such device; name an existing block device\n"
    )
    assert done.code == 4
    assert set(desk.scene.kernel.mapped) == {
        name for name in desk.scene.kernel.mapped if name.startswith(NAME)
    }
    states = [
        t["state"] for t in desk.run(f"dm-remap-validate --config {path} --json").json["targets"]
    ]
    assert states == ["in place", "to do", "refused"]


def test_validate_finds_a_device_under_two_names(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = desk.scene.kernel
    kernel.add_disk("new", desk.scene.spares[0].sectors)
    kernel.disks["/dev/alias"] = kernel.disks["/dev/new"]
    kernel.add_disk("m1", 4096)
    kernel.add_disk("m2", 4096)
    path = write_configuration(
        desk,
        "targets:\n"
        "  - {name: a, main: /dev/m1, spares: [/dev/new], on_error: fail}\n"
        "  - {name: b, main: /dev/m2, spares: [/dev/alias], on_error: fail}\n",
    )
    done = desk.run(f"dm-remap-validate --config {path} --json")
    assert [t["state"] for t in done.json["targets"]] == ["to do", "refused"]
    assert "is a device of target a in the same file" in done.json["targets"][1]["error"]


def test_validate_reports_every_fault(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    # The form of a file needs no rights.
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    path = write_configuration(desk, IN_PLACE.replace("4K", "5").replace("fail", "x"))
    done = desk.run(f"dm-remap-validate --config {path}")
    assert done.code == 4
    assert done.out == (
        f"{path}:5:17: a chunk of 5 bytes is not possible; use a power of two from 4 KiB to 1 MiB\n"
        f"{path}:6:15: on_error 'x' is not known; use hold or fail\n"
        f"{path}: 2 faults\n"
    )
    answer = desk.run(f"dm-remap-validate --config {path} --json").json
    assert [(f["line"], f["column"]) for f in answer["faults"]] == [(5, 17), (6, 15)]
    assert desk.run("dm-remap-validate --config /nowhere/x").code == 1


def test_validate_without_rights(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    path = write_configuration(desk, IN_PLACE)
    assert desk.run(f"dm-remap-validate --config {path} --schema-only").code == 0
    assert desk.run(f"dm-remap-validate --config {path}").code == 3


# How they end


LINES = [
    "dm-remap status",
    f"dm-remap status {NAME}",
    f"dm-remap remap {NAME} 1",
    f"dm-remap return {NAME} 1",
    f"dm-remap history {NAME}",
    f"dm-remap scan {NAME}",
    "dm-remap hidden",
    f"dm-remap metadata dump {NAME}",
    f"dm-remap metadata dump {NAME} --generation 1",
    "dm-remap metadata dump /dev/spare0",
    "dm-remap metadata check /dev/spare0",
    f"dm-remap metadata repair {NAME}",
    f"dm-remap metadata restore /dev/spare0 --backup {NAME}",
]


def test_every_command_is_tried() -> None:
    words = {command.name for command in PROGRAMS["dm-remap"].commands}
    assert words == {
        word for word in words if any(f"dm-remap {word} " in f"{line} " for line in LINES)
    }


@pytest.mark.parametrize("line", LINES)
def test_only_root_may(desk: Desk, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = desk.run(line)
    assert (done.code, done.out) == (3, "")
    assert done.err.endswith(": only root can do this; become root\n")
    as_json = desk.run(f"{line} --json")
    assert as_json.json == {
        "schema": 1,
        "exit_code": 3,
        "error": {"message": "only root can do this", "device": None, "remedy": "become root"},
    }


class Broken(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    "line", [line for line in LINES if "repair" not in line and "restore" not in line]
)
@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 141), (errno.ENOSPC, 1)])
def test_an_output_that_cannot_be_written(desk: Desk, line: str, number: int, code: int) -> None:
    program, *arguments = line.split()
    err = io.StringIO()
    host = desk.host(stdout=Broken(number), stderr=err)
    assert run(PROGRAMS[program], arguments, host) == code
    assert ("No space left" in err.getvalue()) == (number == errno.ENOSPC)


def test_a_closed_error_output_does_not_stop_a_remap(desk: Desk) -> None:
    arguments = ["remap", NAME, "40", "--files-seconds", "0", "--verbose"]
    host = desk.host(stdout=io.StringIO(), stderr=Broken(errno.EPIPE))
    assert run(PROGRAMS["dm-remap"], arguments, host) == 0
    assert desk.scene.generation() == 2


def entry_point(tmp_path: Path, name: str) -> list[str]:
    """The command as the role installs it, with the core elsewhere."""
    (tmp_path / "dm_remap").symlink_to(CORE)
    text = installation.files()[f"/usr/sbin/{name}"].text
    assert text.count('"/usr/lib/dm-remap"') == 1
    (tmp_path / name).write_text(text.replace("/usr/lib/dm-remap", str(tmp_path)))
    return [sys.executable, str(tmp_path / name)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_entry_point_starts_the_program_that_it_is_called(tmp_path: Path, name: str) -> None:
    command = entry_point(tmp_path, name)
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {name} ")
    assert subprocess.run([*command, "--no"], capture_output=True, check=False).returncode == 2
    assert not list(tmp_path.glob("**/__pycache__"))


def test_a_reader_that_goes_away_leaves_no_traceback(tmp_path: Path) -> None:
    command = entry_point(tmp_path, "dm-remap")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            [*command, "--help"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (141, "")


def failing(error: BaseException) -> Program:
    def fail(host: Host, options: Any) -> Result:
        raise error

    return Program("tool", "Fail", [Command("", "Fail", fail)])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (framework.Refused("no", device="/dev/x", remedy="yes"), 3, "tool: /dev/x: no; yes\n"),
        (framework.DmRemapError("a\nb"), 1, "tool: a\ntool: b\n"),
        (framework.DmRemapError("\x1b[31m"), 1, "tool: \\x1b[31m\n"),
        (OSError(errno.EIO, "I/O error", "/dev/x"), 1, "tool: /dev/x: I/O error\n"),
        (OSError(errno.EIO, "I/O error"), 1, "tool: [Errno 5] I/O error\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
    ],
)
def test_how_failures_end(error: BaseException, code: int, text: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    host = Host(log=lambda text: None, stdout=out, stderr=err)
    assert run(failing(error), [], host) == code
    assert (out.getvalue(), err.getvalue()) == ("", text)
    run(failing(error), ["--json"], host)
    if code != 130:
        assert json.loads(out.getvalue())["exit_code"] == code


def test_a_program_s_own_fault_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()), [], Host(log=lambda text: None, stderr=io.StringIO()))


# Questions


@pytest.mark.parametrize(
    ("answer", "code"), [("y\n", 0), ("YES\n", 0), ("n\n", 3), ("", 3), ("\n", 3)]
)
def test_an_answer_decides(desk: Desk, answer: str, code: int) -> None:
    break_copy(desk)
    before = dict(desk.scene.spares[0].content)
    done = desk.run(f"dm-remap metadata repair {NAME}", stdin=Terminal(answer))
    assert done.code == code
    assert (
        "Write generation 1 of target guarded's metadata to /dev/spare0, /dev/spare1? [y/N] "
        in done.err
    )
    assert (desk.scene.spares[0].content == before) == (code == 3)


def test_nobody_is_asked_who_cannot_answer(desk: Desk) -> None:
    break_copy(desk)
    before = dict(desk.scene.spares[0].content)
    for line, stdin in (
        (f"dm-remap metadata repair {NAME}", io.StringIO("y\n")),
        (f"dm-remap metadata repair {NAME} --json", Terminal("y\n")),
    ):
        done = desk.run(line, stdin=stdin)
        assert done.code == 3
        assert "give --yes" in done.err
    assert desk.scene.spares[0].content == before


# Exit codes


def test_the_documented_exit_codes_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "tools.md").read_text()
    section = text.partition("## Exit codes")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    found = {int(row[0].strip("| ")): row[1].rstrip(" |") for row in rows}
    assert found == {int(code): text for code, text in EXIT_TEXTS.items()}
    assert set(EXIT_TEXTS) == set(Exit)


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "tools.md").read_text()
    for program in PROGRAMS.values():
        for command in program.commands:
            assert f"`{program.name} {command.name}".rstrip() in text
