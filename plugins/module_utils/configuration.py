# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The targets that a host is to have, as ``/etc/dm-remap/config.yaml`` describes them.

Its words are those of the module ``target``. Text becomes a `Configuration` or the list of all its
faults, each with its line and column (pure but for `load`). docs/configuration.md describes it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Union

from . import pool
from .errors import DmRemapError, Refused, count_of
from .request import Request, request_faults
from .sizes import bytes_of

PATH = "/etc/dm-remap/config.yaml"
MAX_BYTES = 256 * 1024
NEVER, ALLOWED = "never", "allowed"
DEGRADED = (NEVER, ALLOWED)
MIN_TIMEOUT, MAX_TIMEOUT = 1, 3600

# Deeper than any right file, and far below what could exhaust the parser.
_MAX_DEPTH = 16
_REMEDY = "correct it, see docs/configuration.md"
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})")


@dataclass(frozen=True)
class Assembly:
    """How a target is assembled when the host starts.

    Args:
        auto: whether it is assembled without being asked for.
        degraded: ``never``, or ``allowed``: without spares that did not appear in time. What is on
            them then gives errors.
        timeout: seconds to wait for missing disks, 1 to 3600.
    """

    auto: bool = True
    degraded: str = NEVER
    timeout: int = 60


@dataclass(frozen=True)
class Entry:
    """A target of the configuration.

    Args:
        request: the target, as the module ``target`` plans it.
        assembly: how it is assembled at boot.
        line: where it begins in the file, from 1.
    """

    request: Request
    assembly: Assembly
    line: int


@dataclass(frozen=True)
class Configuration:
    """A file without faults.

    Args:
        path: its path.
        entries: its targets in their order.
        assembly: how targets are assembled at boot that it does not name.
    """

    path: str
    entries: tuple[Entry, ...]
    assembly: Assembly = Assembly()

    def entry(self, name: str) -> Entry | None:
        """The entry of a target, or None."""
        return next((entry for entry in self.entries if entry.request.name == name), None)

    def assembly_of(self, name: str) -> Assembly:
        """How a target is assembled at boot."""
        entry = self.entry(name)
        return entry.assembly if entry else self.assembly


@dataclass(frozen=True, order=True)
class Fault:
    """What is wrong in the file, where (from 1), and what to do about it."""

    line: int
    column: int
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.line}:{self.column}: {self.message}"
        return f"{text}; {self.remedy}" if self.remedy else text


class BadConfiguration(DmRemapError):
    """A configuration file with faults.

    Attributes:
        faults: all of them, in the order of the file; none if it could not be read.
    """

    def __init__(self, path: str, faults: Iterable[Fault]) -> None:
        self.faults = tuple(sorted(faults))
        lines = "".join(f"\n{path}:{fault}" for fault in self.faults)
        super().__init__(f"has {count_of(len(self.faults), 'fault')}{lines}", device=path)


def request_of(values: Mapping[str, Any]) -> Request:
    """The target that the options of the module ``target`` ask for.

    Args:
        values: the module's options by name. What is missing or None is left open, but for name,
            main and spares.

    Raises:
        Refused: ``chunk_size`` or ``migrate_unit`` is no size.
    """
    thresholds = values.get("thresholds") or {}
    return Request(
        name=values["name"],
        main=values["main"],
        spares=tuple(values["spares"]),
        chunk_bytes=_size_of(values, "chunk_size", "use a power of two from 4K to 1M"),
        on_error=values.get("on_error"),
        shim=values.get("shim"),
        wipe=bool(values.get("wipe")),
        discard_remaps=bool(values.get("discard_remaps")),
        allocation=values.get("allocation"),
        warn=thresholds.get("warn"),
        critical=thresholds.get("critical"),
        migrate_from=values.get("migrate_from"),
        migrate_pending=values.get("migrate_pending"),
        migrate_unit=_size_of(values, "migrate_unit", "use a size such as 4K"),
        degraded=bool(values.get("degraded")),
    )


def _size_of(values: Mapping[str, Any], option: str, remedy: str) -> int | None:
    """The bytes that an option asks for, or None where it is not given."""
    given = values.get(option)
    if given is None:
        return None
    try:
        return bytes_of(str(given))
    except ValueError as error:
        raise Refused(
            f"{option} {given!r} is not a size", device=values["name"], remedy=remedy
        ) from error


# Keys of the file by the field of Request that they set, where the two differ.
_KEYS = {"chunk_bytes": "chunk_size"}
_TEXT, _SIZE, _PATHS, _MAPPING = "text", "size", "paths", "mapping"
# Erasing is for a person to decide, so the file has neither wipe nor discard_remaps.
ENTRY_KEYS = {
    "name": _TEXT,
    "main": _TEXT,
    "spares": _PATHS,
    "chunk_size": _SIZE,
    "on_error": _TEXT,
    "shim": _TEXT,
    "allocation": _TEXT,
    "thresholds": _MAPPING,
    "assemble": _MAPPING,
}
_REQUIRED = ("name", "main", "spares")
_FILE_KEYS = ("targets", "assemble")


def load(path: str = PATH) -> Configuration:
    """Read the configuration.

    Raises:
        BadConfiguration: it has faults.
        DmRemapError: it cannot be read, or PyYAML is missing.
    """
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise DmRemapError(
            f"cannot be read: {os.strerror(error.errno or 0)}",
            device=path,
            remedy="write it, see docs/configuration.md, or name another file",
        ) from error
    return parse(raw, path)


def parse(raw: bytes, path: str = PATH) -> Configuration:
    """Check the content of a file.

    Args:
        raw: what is in it.
        path: how it is called in messages.

    Raises:
        BadConfiguration: it has faults.
        DmRemapError: PyYAML is missing.
    """
    reader = _Reader()
    document = _document(raw, reader)
    entries = reader.file(document) if document is not None else ()
    if reader.faults:
        raise BadConfiguration(path, reader.faults)
    return Configuration(path, entries, reader.common)


# Text to nodes


def _yaml() -> Any:
    """PyYAML, which only those hosts need that have such a file."""
    try:
        import yaml
    except ImportError as error:
        raise DmRemapError(
            "the Python module yaml is missing",
            remedy="install python3-yaml, or PyYAML as your distribution calls it",
        ) from error
    return yaml


def _document(raw: bytes, reader: _Reader) -> Any:
    """The file's one document as a node of YAML, or None, with the reason among the faults."""
    yaml = _yaml()
    if len(raw) > MAX_BYTES:
        reader.faults.append(Fault(1, 1, f"the file is larger than {MAX_BYTES // 1024} KiB"))
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        column = len(raw[start : error.start].decode(errors="replace")) + 1
        line = raw.count(b"\n", 0, error.start) + 1
        reader.faults.append(Fault(line, column, "is not UTF-8", "save the file as UTF-8"))
        return None
    try:
        if not _is_simple(yaml, text, reader):
            return None
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        column = error.position - (before.rfind("\n") + 1) + 1
        message = f"the character U+{ord(text[error.position]):04X} is not allowed"
        reader.faults.append(Fault(before.count("\n") + 1, column, message, "remove it"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"is not YAML: {error.problem or error.context}"
        reader.faults.append(Fault(mark.line + 1, mark.column + 1, message, _REMEDY))
    return None


def _is_simple(yaml: Any, text: str, reader: _Reader) -> bool:
    """Whether the text has one document without what makes YAML larger than it looks."""
    depth = documents = 0
    before = len(reader.faults)
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            reader.fault(event, f"the alias *{event.anchor} is not allowed", "write it out")
        elif getattr(event, "anchor", None):
            reader.fault(event, f"the anchor &{event.anchor} is not allowed", "write it out")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents == 2:
                reader.fault(event, "is a second document", "keep one document in the file")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                reader.fault(event, "is nested too deeply", _REMEDY)
                return False
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    if not documents:
        reader.faults.append(Fault(1, 1, "the file is empty", "write targets: [] for none"))
    return documents == 1 and len(reader.faults) == before


# Nodes to values

_NULL, _BOOL, _INT, _STR = (f"tag:yaml.org,2002:{name}" for name in "null bool int str".split())
_KINDS = {
    _NULL: "has no value",
    _BOOL: "is true or false",
    _INT: "is a number",
    "tag:yaml.org,2002:float": "is a number",
    "tag:yaml.org,2002:timestamp": "is a date",
    _STR: "is text",
}
_Value = Union[str, int, bool]


class _Reader:
    """Reads nodes and collects faults."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.common = Assembly()
        self._names: dict[str, int] = {}
        self._devices: dict[str, str] = {}

    def fault(self, node: Any, message: str, remedy: str = "") -> None:
        """Note a fault where a node or an event begins."""
        mark = node.start_mark
        self.faults.append(Fault(mark.line + 1, mark.column + 1, message, remedy))

    def file(self, document: Any) -> tuple[Entry, ...]:
        """The whole file."""
        values = self.mapping(document, "the file", _FILE_KEYS)
        if values is None:
            return ()
        self.common = self.assembly(values.get("assemble"), Assembly())
        if "targets" not in values:
            self.fault(document, "the file has no targets", "write targets: [] for none")
            return ()
        items = self.items(values["targets"], "targets") or ()
        entries = [self.entry(item, self.common) for item in items]
        return tuple(entry for entry in entries if entry)

    def entry(self, node: Any, common: Assembly) -> Entry | None:
        """One target; None if it has faults that leave nothing to go on with."""
        before = len(self.faults)
        values = self.mapping(node, "a target", tuple(ENTRY_KEYS))
        if values is None:
            return None
        for key in _REQUIRED:
            if key not in values:
                self.fault(node, f"the target has no {key}", "add it")
        read: dict[str, Any] = {}
        for key in values:
            read[key] = self.value(key, values[key])
        assembly = self.assembly(values.get("assemble"), common)
        self.together(values, read)
        if len(self.faults) > before:
            return None
        return Entry(request_of(read), assembly, node.start_mark.line + 1)

    def value(self, key: str, node: Any) -> Any:
        """The value of a target's key, or None with a fault."""
        kind = ENTRY_KEYS[key]
        if kind == _PATHS:
            found = self.items(node, key)
            if found is None:
                return None
            return [path for path in (self.path(item, "a spare") for item in found) if path]
        if key == "main":
            return self.path(node, key)
        if kind == _SIZE:
            return self.size(node, key)
        if kind == _TEXT:
            return self.scalar(node, key, _STR)
        return self.thresholds(node) if key == "thresholds" else None

    def together(self, values: Mapping[str, Any], read: Mapping[str, Any]) -> None:
        """What the module ``target`` refuses too, and what contradicts other targets."""
        # What has a fault already is replaced by something that has none.
        spares = values.get("spares")
        count = 1 if spares is None or spares.id != "sequence" else len(spares.value)
        here = {"name": "x", **{key: value for key, value in read.items() if value is not None}}
        request = request_of({**here, "main": "", "spares": ["x"] * count})
        for field, error in request_faults(request):
            key = _KEYS.get(field, field)
            self.fault(values[key], error.message, error.remedy or "")
        name, label = read.get("name"), read.get("name") or "a target without a name"
        if name in self._names:
            message = f"target {name} is there twice, first in line {self._names[name]}"
            self.fault(values["name"], message, "remove one of them, or give it another name")
        elif name:
            self._names[name] = values["name"].start_mark.line + 1
        if read.get("main"):
            self.device(values["main"], read["main"], f"the main of {label}")
        if read.get("spares"):
            for node in values["spares"].value:
                if node.value in read["spares"]:
                    self.device(node, node.value, f"a spare of {label}")

    def device(self, node: Any, path: str, role: str) -> None:
        """Note a device's role; it can have one only."""
        path = os.path.normpath(path)
        if path in self._devices:
            message = f"{path} is {self._devices[path]} already"
            self.fault(node, message, "give each device once in the file")
        else:
            self._devices[path] = role

    def assembly(self, node: Any, common: Assembly) -> Assembly:
        """An assembly policy; what it leaves open is as in ``common``."""
        known = {field.name: getattr(common, field.name) for field in fields(Assembly)}
        values = self.mapping(node, "assemble", tuple(known)) if node is not None else None
        for key, value in (values or {}).items():
            kinds = {"auto": _BOOL, "degraded": _STR, "timeout": _INT}
            found = self.scalar(value, key, kinds[key])
            if found is None:
                continue
            if key == "degraded" and found not in DEGRADED:
                self.fault(
                    value, f"degraded {found!r} is not known", f"use {' or '.join(DEGRADED)}"
                )
            elif key == "timeout" and not MIN_TIMEOUT <= int(found) <= MAX_TIMEOUT:
                self.fault(
                    value,
                    f"a timeout of {found} seconds is not possible",
                    f"use {MIN_TIMEOUT} to {MAX_TIMEOUT}",
                )
            else:
                known[key] = found
        return Assembly(**known)

    def thresholds(self, node: Any) -> dict[str, int] | None:
        """The thresholds of a target."""
        default = pool.Thresholds()
        values = self.mapping(node, "thresholds", ("warn", "critical"))
        if values is None:
            return None
        found = {}
        for key, value in values.items():
            number = self.scalar(value, key, _INT)
            if number is not None:
                found[key] = int(number)
        if len(found) == len(values):
            try:
                pool.Thresholds(
                    found.get("warn", default.warn), found.get("critical", default.critical)
                )
            except Refused as error:
                self.fault(node, error.message, error.remedy or "")
        return found

    def mapping(self, node: Any, what: str, known: Collection[str]) -> dict[str, Any] | None:
        """The value nodes of a mapping by key, or None with a fault."""
        if node.id != "mapping" or not node.tag.endswith(":map"):
            self.fault(node, f"{what} {_kind_of(node)}, not a mapping", f"use {_some(known)}")
            return None
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.id != "scalar" or key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                shown = repr(key) if key_node.id == "scalar" else "that is no word"
                remedy = f"did you mean {near[0]}?" if near else f"use {_some(known)}"
                self.fault(key_node, f"{what} has the unknown key {shown}", remedy)
            elif key in values:
                self.fault(key_node, f"the key {key} is there twice", "remove one of them")
            else:
                values[key] = value_node
        return values

    def items(self, node: Any, what: str) -> list[Any] | None:
        """The nodes of a list, or None with a fault."""
        if node.id != "sequence" or not node.tag.endswith(":seq"):
            self.fault(node, f"{what} {_kind_of(node)}, not a list", "begin each item with a dash")
            return None
        return list(node.value)

    def scalar(self, node: Any, what: str, tag: str) -> _Value | None:
        """Text, a whole number or a truth value, or None with a fault."""
        wanted = {_STR: "text", _INT: "a whole number", _BOOL: "true or false"}[tag]
        if node.id != "scalar" or node.tag != tag or (tag == _INT and not _whole(node)):
            remedy = f"use {wanted}"
            if tag == _STR and node.id == "scalar" and node.tag != _NULL:
                remedy = "put it into quotes"
            self.fault(node, f"{what} {_kind_of(node)}, not {wanted}", remedy)
            return None
        if tag == _BOOL:
            return str(node.value).lower() in ("true", "yes", "on")
        return int(node.value) if tag == _INT else str(node.value)

    def path(self, node: Any, what: str) -> str | None:
        """The absolute path of a device, or None with a fault."""
        found = self.scalar(node, what, _STR)
        if found is None:
            return None
        if not str(found).startswith("/") or not str(found).isprintable():
            message = f"{what} {found!r} is not an absolute path"
            self.fault(node, message, "use one such as /dev/disk/by-id/NAME")
            return None
        return str(found)

    def size(self, node: Any, what: str) -> int | None:
        """A size in bytes, or None with a fault."""
        if node.id == "scalar" and node.tag in (_INT, _STR):
            try:
                if node.tag == _STR or _whole(node):
                    return bytes_of(node.value)
            except ValueError:
                pass
        self.fault(node, f"{what} {_kind_of(node)}, not a size", "use a power of two from 4K to 1M")
        return None


def _whole(node: Any) -> bool:
    """Whether a number is written as everybody reads it: YAML takes 010 for 8 and 1:30 for 90."""
    return bool(_INTEGER.fullmatch(node.value))


def _kind_of(node: Any) -> str:
    if node.id == "scalar":
        if node.tag not in _KINDS:
            return f"has the tag {node.tag}"
        shown = "" if node.tag == _NULL else f" ({node.value!r})"
        return f"{_KINDS[node.tag]}{shown}"
    plain, shown = ("map", "is a mapping") if node.id == "mapping" else ("seq", "is a list")
    return shown if node.tag == f"tag:yaml.org,2002:{plain}" else f"has the tag {node.tag}"


def _some(words: Collection[str]) -> str:
    return f"one of {', '.join(words)}"
