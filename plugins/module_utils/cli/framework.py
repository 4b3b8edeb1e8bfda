# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What all command-line tools share: commands, their results, exit codes, and how they are run.

A tool is a `Program`. A command is made of a function that adds its arguments to a parser and a
function that gives a `Result`; everything else (``--json``, errors, warnings, exit codes,
completion and manual pages) follows from that.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import os
import sys
import syslog
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Callable, NoReturn

from .. import backups, blockdev, discovery
from ..devmapper import DeviceMapper
from ..errors import DmRemapError, Refused
from ..first_look import FOLDERS
from .text import clean

if TYPE_CHECKING:
    from ..engine import Engine

# Version of what --json prints: it rises when a key changes its meaning or goes away.
SCHEMA = 1
JOURNAL = "/var/lib/dm-remap/journal.db"


class Exit(enum.IntEnum):
    """Exit codes of all tools."""

    OK = 0
    ERROR = 1
    USAGE = 2
    REFUSED = 3
    FOUND = 4
    INTERRUPTED = 130
    CLOSED = 141


# One text for the documentation, the manual pages and the tests.
EXIT_TEXTS = {
    Exit.OK: "It is done, or there was nothing to do, and what was looked at is in order.",
    Exit.ERROR: "A step failed. What was done so far stays; the message says how to go on.",
    Exit.USAGE: "The command line is wrong. Nothing was done.",
    Exit.REFUSED: "It was refused before anything was changed. The message says what is needed.",
    Exit.FOUND: (
        "It is done, but something is not in order: a target is degraded or damaged, copies of "
        "the metadata are, sectors are lost, chunks stayed where they were, one of several targets "
        "was refused, or a configuration has faults or asks for what is refused."
    ),
    Exit.INTERRUPTED: "It was interrupted from the keyboard (SIGINT).",
    Exit.CLOSED: "Who read the output closed it. What was to be done is done.",
}


@dataclass(frozen=True)
class Result:
    """What a command found or did.

    Args:
        data: for ``--json``: plain data, whose keys docs/tools.md describes.
        lines: the same for people.
        code: the exit code.
        warnings: sentences about what should be looked at; they go to the standard error too.
        raw: print ``lines`` with ``--json`` too, because they are JSON themselves.
    """

    data: Mapping[str, Any]
    lines: Sequence[str]
    code: Exit = Exit.OK
    warnings: Sequence[str] = ()
    raw: bool = False


class Host:
    """The host that commands look at and change; tests give another one.

    Args:
        engine: makes the engine, with a function that takes sentences about what begins.
        mapper: makes device-mapper.
        blocks: block devices.
        backup_dir: folder of the metadata backups.
        journal: the daemon's journal.
        mains: folders of the mains that are known.
        log: takes a sentence for the system's log, which has what was changed.
        stdin, stdout, stderr: the standard streams.
    """

    def __init__(
        self,
        engine: Callable[[Callable[[str], None]], Engine] | None = None,
        mapper: Callable[[], discovery.Tables] = DeviceMapper,
        blocks: Any = blockdev,
        backup_dir: str = backups.FOLDER,
        journal: str = JOURNAL,
        mains: Sequence[str] = FOLDERS,
        log: Callable[[str], None] = syslog.syslog,
        stdin: IO[str] | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        self._make_engine = engine or _engine
        self._mapper = mapper
        self._blocks = blocks
        self.backups = backups.Backups(backup_dir)
        self.journal = journal
        self.mains = mains
        self.log = log
        self.stdin = stdin or sys.stdin
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.verbose = False

    def engine(self) -> Engine:
        """The engine.

        Raises:
            DmRemapError: not root, or the kernel or a library lacks something.
        """
        self.check_root()
        engine = self._make_engine(self._progress)
        engine.check_host()
        return engine

    def look(self) -> discovery.Host:
        """Look at all devices of the host, and at what it knows of its targets.

        Raises:
            DmRemapError: not root, or there is no device-mapper.
        """
        self.check_root()
        return discovery.observe(self._blocks, self._mapper(), self.backups)

    def devno_of(self, path: str) -> str:
        """Device number of a path.

        Raises:
            Refused: there is no such device.
        """
        return str(self._blocks.describe(path).devno)

    def check_root(self) -> None:
        """Refuse everybody but root, before a library can fail with a message of its own."""
        if os.geteuid() != 0:
            raise Refused("only root can do this", remedy="become root")

    def _progress(self, text: str) -> None:
        self.log(clean(text))
        if self.verbose:
            # Nobody who reads this any more must not end what has begun.
            with contextlib.suppress(OSError):
                self.stderr.write(clean(text) + "\n")

    def confirm(self, options: argparse.Namespace, question: str) -> None:
        """Ask whether to write to disks, unless ``--yes`` was given.

        Raises:
            Refused: the answer is no, or nobody can be asked.
        """
        if options.yes:
            return
        if options.json or not self.stdin.isatty():
            raise Refused(
                "needs a confirmation before it writes",
                remedy="give --yes, or --dry-run to see what would be done",
            )
        self.stderr.write(f"{clean(question)} [y/N] ")
        self.stderr.flush()
        if self.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refused("was not confirmed, so nothing was written", remedy="give --yes")


def _engine(progress: Callable[[str], None]) -> Engine:
    # To look at the host, nothing of it is needed, and it takes longer to import than to look.
    from ..engine import Engine

    return Engine(guard=True, progress=progress)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    return


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        name: its name, such as ``status`` or ``metadata dump``; "" for a program's only one.
        help: what it does, in a line without a full stop.
        description: paragraphs for the manual page and ``--help``.
        run: does it.
        arguments: adds its arguments with `add`.
        examples: command lines with what they do.
    """

    name: str
    help: str
    run: Callable[[Host, argparse.Namespace], Result]
    arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    description: Sequence[str] = ()
    examples: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Program:
    """A program: its name, one line about it, paragraphs about it, and its commands.

    Args:
        name: as it is called.
        help: what it does, in a line without a full stop.
        commands: one with the name "", or several with names.
        groups: a line about each group of commands, by its word.
        description: paragraphs.
        files: files that it uses, with what they are.
    """

    name: str
    help: str
    commands: Sequence[Command]
    groups: Mapping[str, str] = field(default_factory=dict)
    description: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def single(self) -> Command | None:
        """Its only command, where it has no subcommands."""
        return next((command for command in self.commands if not command.name), None)


# What an argument is, for completion.
TARGET, DEVICE, FILE, TARGET_OR_DEVICE = "target", "device", "file", "target or device"


def add(
    parser: argparse._ActionsContainer, *names: str, completes: str = "", **settings: Any
) -> argparse.Action:
    """Add an argument to a parser.

    Args:
        parser: the command's, or a group of it.
        names: as for `argparse.ArgumentParser.add_argument`.
        completes: what its values are: TARGET, DEVICE, FILE or TARGET_OR_DEVICE.
        settings: as for `argparse.ArgumentParser.add_argument`.
    """
    action = parser.add_argument(*names, **settings)
    action.completes = completes  # type: ignore[attr-defined]
    return action


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add ``--dry-run``."""
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and do nothing"
    )


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that asks before it writes."""
    add_dry_run(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask before writing")


class UsageError(Exception):
    """The command line is wrong; the message is ready to be printed."""


class _Leave(Exception):
    """The command line asked for help; the text."""


class _Parser(argparse.ArgumentParser):
    """A parser that neither prints nor ends the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.format_usage()}{self.prog}: {message}\n")

    def print_help(self, file: Any = None) -> None:
        raise _Leave(self.format_help())


def parser_of(program: Program) -> argparse.ArgumentParser:
    """The parser of a program, with the parsers of its commands below it."""
    parser = _parser(program.name, program.help, program.description, program.single)
    if program.single:
        return parser
    tops = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    groups: dict[str, Any] = {}
    for command in program.commands:
        word, _space, rest = command.name.partition(" ")
        place, name = tops, word
        if rest:
            if word not in groups:
                about = program.groups[word]
                # `help` is what the list of commands shows.
                group = tops.add_parser(word, help=about, description=f"{about}.")
                groups[word] = group.add_subparsers(
                    metavar="COMMAND", required=True, parser_class=_Parser
                )
            place, name = groups[word], rest
        made = place.add_parser(name, help=command.help, allow_abbrev=False)
        _fill(made, command.help, command.description, command)
    return parser


def _parser(
    name: str, about: str, description: Sequence[str], command: Command | None
) -> argparse.ArgumentParser:
    parser = _Parser(prog=name, allow_abbrev=False)
    _fill(parser, about, description, command)
    return parser


def _fill(
    parser: argparse.ArgumentParser, about: str, description: Sequence[str], command: Command | None
) -> None:
    parser.description = " ".join([f"{about}.", *description])
    if command is None:
        return
    command.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--verbose", action="store_true", help="say on the standard error what begins"
    )
    parser.set_defaults(command=command)


def run(program: Program, arguments: Sequence[str], host: Host | None = None) -> int:
    """Run a program's command line; the exit code.

    Args:
        program: the program.
        arguments: without its name.
        host: the host; None takes this one.
    """
    host = host or Host()
    try:
        return int(_run(program, arguments, host))
    except BrokenPipeError:
        _drop_output(host.stdout)
        return int(Exit.CLOSED)
    except OSError as error:
        # Only writing to the standard streams is left that can fail like this.
        with contextlib.suppress(OSError):
            host.stderr.write(f"{program.name}: the output cannot be written: {error.strerror}\n")
        _drop_output(host.stdout)
        return int(Exit.ERROR)


def _run(program: Program, arguments: Sequence[str], host: Host) -> Exit:
    try:
        options = parser_of(program).parse_args(arguments)
    except _Leave as leaving:
        host.stdout.write(str(leaving))
        host.stdout.flush()
        return Exit.OK
    except UsageError as error:
        host.stderr.write(str(error))
        return Exit.USAGE
    host.verbose = options.verbose
    command: Command = options.command
    name = f"{program.name} {command.name}".strip()
    try:
        result = command.run(host, options)
    except DmRemapError as error:
        code = Exit.REFUSED if isinstance(error, Refused) else Exit.ERROR
        _print_error(host, name, options.json, error, code)
        return code
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _print_error(host, name, options.json, DmRemapError(text), Exit.ERROR)
        return Exit.ERROR
    except KeyboardInterrupt:
        host.stderr.write(f"{name}: interrupted\n")
        return Exit.INTERRUPTED
    for warning in result.warnings:
        host.stderr.write(f"{name}: {clean(warning)}\n")
    if options.json and not result.raw:
        _print_json(host, {**result.data, "warnings": list(result.warnings)}, result.code)
    else:
        host.stdout.write("".join(f"{line}\n" for line in result.lines))
    host.stdout.flush()
    return result.code


def _print_json(host: Host, data: Mapping[str, Any], code: Exit) -> None:
    document = {"schema": SCHEMA, "exit_code": int(code), **data}
    host.stdout.write(json.dumps(document, indent=2) + "\n")


def _print_error(host: Host, name: str, as_json: bool, error: DmRemapError, code: Exit) -> None:
    host.stderr.write("".join(f"{name}: {clean(line)}\n" for line in str(error).splitlines()))
    if not as_json:
        return
    found: dict[str, Any] = {
        "message": error.message,
        "device": error.device,
        "remedy": error.remedy,
    }
    # A faulty configuration has several.
    if faults := getattr(error, "faults", None):
        found["faults"] = [vars(fault) for fault in faults]
    _print_json(host, {"error": found}, code)
    host.stdout.flush()


def _drop_output(stream: IO[str]) -> None:
    """Let what Python still flushes at its end go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
