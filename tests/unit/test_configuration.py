# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration file: every fault is found, with its line and column, and nothing else is."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dm_remap import configuration, pool
from dm_remap.configuration import (
    Assembly,
    BadConfiguration,
    Configuration,
    load,
    parse,
    request_of,
)
from dm_remap.errors import DmRemapError
from dm_remap.planner import plan_present
from dm_remap.request import ON_ERROR, SHIMS, Request
from dm_remap.sizes import bytes_of, size_text
from tests.unit.test_planner import REQUEST, blank

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
assemble:
  timeout: 120
targets:
  - name: data
    main: /dev/main
    spares:
      - /dev/spare0
      - /dev/spare1
    chunk_size: 128K
    on_error: fail
    shim: none
    allocation: balanced
    thresholds: {warn: 60, critical: 85}
  - name: logs
    main: /dev/logs
    spares: [/dev/spare2]
    assemble: {auto: no, degraded: allowed}
"""


def faults_of(text: str | bytes) -> list[str]:
    """Every fault as ``LINE:COLUMN: message; remedy``."""
    raw = text.encode() if isinstance(text, str) else text
    with pytest.raises(BadConfiguration) as caught:
        parse(raw, "config.yaml")
    assert caught.value.faults
    shown = str(caught.value)
    assert all(f"\nconfig.yaml:{fault}" in shown for fault in caught.value.faults)
    return [str(fault) for fault in caught.value.faults]


def test_a_good_file() -> None:
    found = parse(GOOD.encode(), "config.yaml")
    assert found.path == "config.yaml"
    data, logs = found.entries
    assert data.request == Request(
        "data",
        "/dev/main",
        ("/dev/spare0", "/dev/spare1"),
        chunk_bytes=131072,
        on_error="fail",
        shim="none",
        allocation="balanced",
        warn=60,
        critical=85,
    )
    assert (data.line, logs.line) == (4, 14)
    assert data.assembly == Assembly(auto=True, degraded="never", timeout=120)
    assert logs.assembly == Assembly(auto=False, degraded="allowed", timeout=120)
    # What the file leaves open is for the planner to decide, as it is for the module.
    assert logs.request == Request("logs", "/dev/logs", ("/dev/spare2",))
    assert found.entry("logs") is logs
    assert found.entry("data2") is None


def test_a_file_may_have_no_targets() -> None:
    assert parse(b"targets: []\n", "x") == Configuration("x", ())


def target(**keys: str) -> str:
    """A file with one target, a key a line, the first of which is in line 2 at column 5."""
    given = {"name": "data", "main": "/dev/a", "spares": "[/dev/b]", **keys}
    lines = [f"{key}: {value}" for key, value in given.items() if value != "-"]
    return "targets:\n  - " + "\n    ".join(lines) + "\n"


# A text, and all its faults: line and column, and the beginning of the message.
BROKEN: list[tuple[str | bytes, list[str]]] = [
    # The file as a whole
    ("", ["1:1: the file is empty"]),
    ("# nothing\n", ["1:1: the file is empty"]),
    ("[]\n", ["1:1: the file is a list, not a mapping"]),
    ("5\n", ["1:1: the file is a number ('5'), not a mapping"]),
    ("{}\n", ["1:1: the file has no targets; write targets: []"]),
    ("targets:\n", ["1:9: targets has no value, not a list"]),
    ("targets: {}\n", ["1:10: targets is a mapping, not a list"]),
    ("targets: []\nmore: 1\n", ["2:1: the file has the unknown key 'more'"]),
    (
        "target: []\n",
        ["1:1: the file has no targets", "1:1: the file has the unknown key 'target'"],
    ),
    ("targets: []\ntargets: []\n", ["2:1: the key targets is there twice"]),
    ("targets: []\n---\ntargets: []\n", ["2:1: is a second document"]),
    ("targets: []\n5: 1\n", ["2:1: the file has the unknown key '5'"]),
    ("targets: []\n? [a]\n: 1\n", ["2:3: the file has the unknown key that is no word"]),
    # Not YAML, and YAML that is not allowed
    ("targets: [\n", ["2:1: is not YAML"]),
    ("targets: []\n  - x\n", ["2:3: is not YAML"]),
    ("targets:\n\t- x\n", ["2:1: is not YAML"]),
    ('targets: "\n', ["2:1: is not YAML"]),
    ("targets: @\n", ["1:10: is not YAML"]),
    ("targets: []\n\nx: \x07\n", ["3:4: the character U+0007 is not allowed"]),
    ("a: 1\nb: \x00\n", ["2:4: the character U+0000 is not allowed"]),
    (b"targets: []\n# \xc3\xa4\xff\n", ["2:4: is not UTF-8"]),
    ("targets: &all []\n", ["1:10: the anchor &all is not allowed"]),
    (
        "targets: &all []\nassemble: *all\n",
        ["1:10: the anchor &all is not allowed", "2:11: the alias *all is not allowed"],
    ),
    ("targets: " + "[" * 20 + "]" * 20, ["1:25: is nested too deeply"]),
    (
        "targets: !!python/name:os.system []\n",
        ["1:10: targets has the tag tag:yaml.org,2002:python"],
    ),
    ("!!set {targets}\n", ["1:1: the file has the tag tag:yaml.org,2002:set, not a mapping"]),
    (target(name="!!binary aGFsbG8="), ["2:11: name has the tag tag:yaml.org,2002:binary"]),
    # A target as a whole
    ("targets: [data]\n", ["1:11: a target is text ('data'), not a mapping"]),
    (
        "targets:\n  - {}\n",
        [f"2:5: the target has no {key}" for key in ("main", "name", "spares")],
    ),
    (target(name="-"), ["2:5: the target has no name"]),
    (target(main="-"), ["2:5: the target has no main"]),
    (target(spares="-"), ["2:5: the target has no spares"]),
    (
        target(chunksize="64K"),
        ["5:5: a target has the unknown key 'chunksize'; did you mean chunk_size?"],
    ),
    (target(wipe="true"), ["5:5: a target has the unknown key 'wipe'; use one of name, main"]),
    (
        "targets:\n  - name: a\n    name: b\n    main: /a\n    spares: [/b]\n",
        ["3:5: the key name is there"],
    ),
    # Names
    (target(name=""), ["2:10: name has no value, not text; use text"]),
    (target(name="2024.10"), ["2:11: name is a number ('2024.10'), not text; put it into quotes"]),
    (target(name="2024-10-11"), ["2:11: name is a date ('2024-10-11'), not text; put it"]),
    (target(name="on"), ["2:11: name is true or false ('on'), not text; put it into quotes"]),
    (target(name="~"), ["2:11: name has no value, not text; use text"]),
    (target(name="[a]"), ["2:11: name is a list, not text; use text"]),
    (target(name="-a"), ["2:11: not a valid target name"]),
    (target(name="a/b"), ["2:11: not a valid target name"]),
    (target(name='""'), ["2:11: not a valid target name"]),
    (target(name="a" * 97), ["2:11: not a valid target name"]),
    # Devices
    (target(main="sda"), ["3:11: main 'sda' is not an absolute path"]),
    (target(main="5"), ["3:11: main is a number ('5'), not text"]),
    (target(main='"/dev/a\\n"'), ["3:11: main '/dev/a\\n' is not an absolute path"]),
    (target(spares="/dev/b"), ["4:13: spares is text ('/dev/b'), not a list"]),
    (target(spares="[]"), ["4:13: has 0 spares; give 1 to 8 spares"]),
    (
        target(spares="[" + ", ".join(f"/dev/{n}" for n in range(9)) + "]"),
        ["4:13: has 9 spares; give 1 to 8 spares"],
    ),
    (
        target(spares="[/dev/b, c, 7]"),
        ["4:22: a spare 'c' is not", "4:25: a spare is a number ('7')"],
    ),
    (target(spares="[/dev/a]"), ["4:14: /dev/a is the main of data already"]),
    (target(spares="[/dev/./a]"), ["4:14: /dev/a is the main of data already"]),
    (target(spares="[/dev/b, /dev//b]"), ["4:22: /dev/b is a spare of data already"]),
    # Sizes and words
    (
        target(chunk_size="65K"),
        ["5:17: a chunk of 66560 bytes is not possible; use a power of two"],
    ),
    (target(chunk_size="2K"), ["5:17: a chunk of 2048 bytes is not possible"]),
    (target(chunk_size="2M"), ["5:17: a chunk of 2097152 bytes is not possible"]),
    (target(chunk_size="0"), ["5:17: a chunk of 0 bytes is not possible"]),
    (target(chunk_size="-65536"), ["5:17: chunk_size is a number ('-65536'), not a size"]),
    (target(chunk_size="0o200000"), ["5:17: chunk_size is text ('0o200000'), not a size"]),
    (target(chunk_size="0x10000"), ["5:17: chunk_size is a number ('0x10000'), not a size"]),
    (target(chunk_size="65536.0"), ["5:17: chunk_size is a number ('65536.0'), not a size"]),
    (target(chunk_size="huge"), ["5:17: chunk_size is text ('huge'), not a size"]),
    (target(chunk_size="true"), ["5:17: chunk_size is true or false ('true'), not a size"]),
    (target(chunk_size="9" * 5000), ["5:17: chunk_size is a number"]),
    (target(on_error="wait"), ["5:15: on_error 'wait' is not known; use hold or fail"]),
    (target(shim="raid1"), ["5:11: shim 'raid1' is not known; use none, raid or auto"]),
    (target(shim="null"), ["5:11: shim has no value, not text; use text"]),
    (
        target(allocation="random"),
        ["5:17: allocation 'random' is not known; use first_fit, balanced or health"],
    ),
    # Thresholds
    (target(thresholds="80"), ["5:17: thresholds is a number ('80'), not a mapping"]),
    (
        target(thresholds="{warm: 1}"),
        ["5:18: thresholds has the unknown key 'warm'; did you mean warn?"],
    ),
    (
        target(thresholds="{warn: 96}"),
        ["5:17: thresholds warn 96 and critical 95 are not possible"],
    ),
    (target(thresholds="{warn: 0}"), ["5:17: thresholds warn 0 and critical 95 are not"]),
    (target(thresholds="{critical: 101}"), ["5:17: thresholds warn 80 and critical 101 are not"]),
    (target(thresholds="{warn: 1:20}"), ["5:24: warn is a number ('1:20'), not a whole number"]),
    (target(thresholds="{warn: 010}"), ["5:24: warn is a number ('010'), not a whole number"]),
    (target(thresholds="{warn: 8.5}"), ["5:24: warn is a number ('8.5'), not a whole number"]),
    (target(thresholds="{warn: '80'}"), ["5:24: warn is text ('80'), not a whole number"]),
    # Assembly
    (target(assemble="yes"), ["5:15: assemble is true or false ('yes'), not a mapping"]),
    (target(assemble="{auto: 1}"), ["5:22: auto is a number ('1'), not true or false"]),
    (target(assemble="{auto: 'no'}"), ["5:22: auto is text ('no'), not true or false"]),
    (target(assemble="{degraded: true}"), ["5:26: degraded is true or false ('true'), not text"]),
    (target(assemble="{degraded: maybe}"), ["5:26: degraded 'maybe' is not known; use never or"]),
    (
        target(assemble="{timeout: 0}"),
        ["5:25: a timeout of 0 seconds is not possible; use 1 to 3600"],
    ),
    (target(assemble="{timeout: 3601}"), ["5:25: a timeout of 3601 seconds is not possible"]),
    (target(assemble="{timeout: -1}"), ["5:25: a timeout of -1 seconds is not possible"]),
    (
        target(assemble="{timeot: 5}"),
        ["5:16: assemble has the unknown key 'timeot'; did you mean timeout?"],
    ),
    ("targets: []\nassemble: {degraded: no}\n", ["2:22: degraded is true or false"]),
    # Several at once
    (
        "assemble: {timeout: 0}\n"
        "targets:\n"
        "  - name: a\n"
        "    main: /dev/1\n"
        "    spares: [/dev/2, x]\n"
        "    shim: x\n"
        "    on_error: x\n"
        "  - name: a\n"
        "    spares: [/dev/1, /dev/2]\n"
        "    chunk_size: 5\n",
        [
            "1:21: a timeout of 0",
            "5:22: a spare 'x' is not an absolute path",
            "6:11: shim 'x' is not known",
            "7:15: on_error 'x' is not known",
            "8:5: the target has no main",
            "8:11: target a is there twice, first in line 3",
            "9:14: /dev/1 is the main of a already",
            "9:22: /dev/2 is a spare of a already",
            "10:17: a chunk of 5 bytes",
        ],
    ),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN, ids=range(len(BROKEN)))
def test_every_fault_has_its_place(text: str | bytes, expected: list[str]) -> None:
    found = faults_of(text)
    assert len(found) == len(expected), found
    for one, beginning in zip(found, expected):
        assert one.startswith(beginning), found


@pytest.mark.parametrize("line", range(len(GOOD.splitlines())))
def test_a_fault_moves_with_its_line(line: int) -> None:
    """A bad key in any line is told with that line, whatever is around it."""
    lines = GOOD.splitlines(keepends=True)
    key = lines[line].lstrip(" -")
    if ":" not in key:
        return
    lines[line] = lines[line].replace(key, "zzz" + key, 1)
    place = f"{line + 1}:{len(lines[line]) - len(key) - 3 + 1}: "
    assert any(f.startswith(place) and "unknown key 'zzz" in f for f in faults_of("".join(lines)))


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"#" * configuration.MAX_BYTES)
    with pytest.raises(BadConfiguration, match="1:1: the file is empty"):
        load(str(path))
    with open(path, "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadConfiguration, match="1:1: the file is larger than 256 KiB"):
        load(str(path))


def test_a_bomb_does_not_explode() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(20)
    )
    found = faults_of(bomb)
    assert len(found) == 21 + 20 * 9
    assert all("is not allowed" in fault for fault in found)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(DmRemapError, match=r"none\.yaml: cannot be read: No such file.*docs/conf"):
        load(str(tmp_path / "none.yaml"))
    with pytest.raises(DmRemapError, match="cannot be read: Is a directory"):
        load(str(tmp_path))


def test_without_pyyaml_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(DmRemapError, match="python3-yaml"):
        parse(b"targets: []")


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))
)
def test_arbitrary_bytes_are_only_ever_faults(raw: bytes) -> None:
    for candidate in (raw, b"targets:\n  - " + raw, b"targets: [{name: " + raw):
        faults = judged(candidate)
        assert all(fault.line >= 1 and fault.column >= 1 for fault in faults)


def judged(raw: bytes) -> tuple[configuration.Fault, ...]:
    """The faults of a file; none where it is accepted."""
    try:
        parse(raw)
    except BadConfiguration as error:
        return error.faults
    return ()


yaml_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*configuration.ENTRY_KEYS, "warn", "auto", "timeout"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.fixed_dictionaries({}, optional={"targets": yaml_values, "assemble": yaml_values}))
def test_what_is_accepted_is_what_was_written(document: dict[str, Any]) -> None:
    text = yaml.safe_dump(document, allow_unicode=True)
    try:
        found = parse(text.encode())
    except BadConfiguration:
        return
    assert [entry.request.name for entry in found.entries] == [
        item["name"] for item in document["targets"]
    ]


# One place knows the words


def module_options() -> dict[str, Any]:
    """The options of the module `target`, from its documentation."""
    tree = ast.parse((ROOT / "plugins" / "modules" / "target.py").read_text())
    texts = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return dict(yaml.safe_load(ast.literal_eval(texts["DOCUMENTATION"]))["options"])


def test_the_words_are_those_of_the_module() -> None:
    options = module_options()
    # What only a person decides, what is no state, what is done once, and what is the host's own.
    own = {"wipe", "discard_remaps", "state", "copy_rate"}
    own |= {"migrate_from", "migrate_pending", "migrate_unit", "degraded"}
    assert set(configuration.ENTRY_KEYS) - {"assemble"} == set(options) - own
    assert tuple(options["on_error"]["choices"]) == ON_ERROR
    assert tuple(options["shim"]["choices"]) == SHIMS
    assert tuple(options["allocation"]["choices"]) == pool.POLICIES


@pytest.mark.parametrize("key", ["on_error", "shim", "allocation"])
def test_every_value_of_the_module_is_accepted(key: str) -> None:
    for value in module_options()[key]["choices"]:
        (entry,) = parse(target(**{key: value}).encode()).entries
        assert getattr(entry.request, key) == value


@pytest.mark.parametrize("size", ["4K", "64K", "65536", "64 KiB", "0.5M", "1M"])
def test_what_the_file_accepts_the_planner_plans(size: str) -> None:
    (entry,) = parse(target(chunk_size=size).encode()).entries
    assert entry.request.chunk_bytes == bytes_of(size)
    request = replace(entry.request, name=REQUEST.name, main=REQUEST.main, spares=REQUEST.spares)
    assert plan_present(request, blank()).changes


def test_options_that_are_left_open_are_none() -> None:
    given = {"name": "a", "main": "/m", "spares": ["/s"], "thresholds": None, "wipe": False}
    assert request_of(given) == Request("a", "/m", ("/s",))
    with pytest.raises(DmRemapError, match="chunk_size 'x' is not a size"):
        request_of({**given, "chunk_size": "x"})


# Sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("512B", 512),
        ("4k", 4096),
        ("64KB", 65536),
        ("64 KiB", 65536),
        (" 1.5M ", 3 << 19),
        ("2T", 2 << 40),
        ("1E", 1 << 60),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1.5", "0.3K", "1.K", "64 Kb x", "1e3", "٣K", "0x10"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size|is a fraction"):
        bytes_of(text)


@given(st.integers(0, 1 << 70))
def test_sizes_are_shown_in_a_unit_of_which_there_is_one(count: int) -> None:
    text = size_text(count)
    if count < 1 << 60 and text.endswith(" B"):
        assert count < 1024
    number, unit = text.split()
    assert float(number) >= 1 or count == 0
    assert unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
