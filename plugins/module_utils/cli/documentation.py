# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bash completion and manual pages, made from the parsers of the programs (pure)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from .framework import (
    DEVICE,
    EXIT_TEXTS,
    FILE,
    TARGET,
    TARGET_OR_DEVICE,
    Command,
    Program,
    parser_of,
)
from .programs import PROGRAMS

SECTION = 8

Parsers = dict[str, argparse.ArgumentParser]


def commands_below(parser: argparse.ArgumentParser) -> Parsers:
    """The parsers of a parser's commands, by their words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def walk(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, Parsers]]:
    """Every parser with commands, by the words that lead to it."""
    below = commands_below(parser)
    yield words, below
    for word, sub in below.items():
        if commands_below(sub):
            yield from walk(sub, f"{words} {word}".strip())


def leaves(parser: argparse.ArgumentParser, words: str = "") -> Parsers:
    """Every parser without commands, by the words that lead to it."""
    below = commands_below(parser)
    if not below:
        return {words: parser}
    found: Parsers = {}
    for word, sub in below.items():
        found.update(leaves(sub, f"{words} {word}".strip()))
    return found


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings]


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    actions = [action for action in parser._actions if not action.option_strings]
    return [action for action in actions if not isinstance(action, argparse._SubParsersAction)]


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


# Completion

_SOURCES = {
    TARGET: "_dm_remap_targets",
    DEVICE: 'compgen -f -- "$word"',
    FILE: 'compgen -f -- "$word"',
    TARGET_OR_DEVICE: '_dm_remap_targets; compgen -f -- "$word"',
}

_COMPLETION = """\
# Completion of {name} for bash, made by dm_remap's cli.documentation.

_dm_remap_targets() {{
    local place uuid name
    for place in /sys/block/dm-*/dm; do
        {{ read -r uuid <"$place/uuid" && read -r name <"$place/name"; }} 2>/dev/null || continue
        [[ $uuid =~ ^DMREMAP-[0-9a-f]{{32}}$ ]] && printf '%s\\n' "$name"
    done
}}

{function}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words="" i
    local command="" options="" found=""
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$command ${{COMP_WORDS[i]}}" in
{words}
        *) break ;;
        esac
    done
    case "$command" in
{commands}
    esac
    if [[ $word == -* ]]; then
        words=$options
        found=""
    fi
    local IFS=$'\\n'
    mapfile -t COMPREPLY < <(compgen -W "${{words// /$'\\n'}}"$'\\n'"$found" -- "$word")
}}

complete -o filenames -F {function} {name}
"""


def completion(program: Program) -> str:
    """The bash completion of a program."""
    parser = parser_of(program)
    function = "_" + re.sub("[^a-z]", "_", program.name)
    known, cases = [], []
    for words, below in walk(parser):
        for word in below:
            full = f"{words} {word}".strip()
            known.append(f'        "{words} {word}") command="{full}" ;;')
        if below:
            cases += [f'    "{words}")', f'        words="{" ".join(below)}"', "        ;;"]
    for words, leaf in leaves(parser).items():
        cases += _completion_of(words, leaf)
    return _COMPLETION.format(
        name=program.name,
        function=function,
        words="\n".join(known),
        commands="\n".join(cases),
    )


def _completion_of(words: str, parser: argparse.ArgumentParser) -> list[str]:
    options = _options(parser)
    names = " ".join(name for action in options for name in action.option_strings)
    lines = [f'    "{words}")', f'        options="{names}"']
    lines.append('        case "$before" in')
    for action in options:
        if not _takes_value(action):
            continue
        found = _found(action)
        lines.append(f"        {' | '.join(action.option_strings)}) {found or ':'} ;;")
    positionals = [found for found in map(_found, _positionals(parser)) if found]
    lines.append(f"        *) {positionals[0] if positionals else ':'} ;;")
    return [*lines, "        esac", "        ;;"]


def _found(action: argparse.Action) -> str:
    """What sets the candidates for an argument's value."""
    if action.choices:
        return f'words="{" ".join(map(str, action.choices))}"'
    source = _SOURCES.get(getattr(action, "completes", ""))
    return f"found=$({source})" if source else ""


# Manual pages


def _roff(text: str) -> str:
    """Text of one line as roff shows it: nothing in it is a request or an escape."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join(
        f"\\&{line}" if line[:1] in (".", "'") else line for line in escaped.split("\n")
    )


def _bold(text: str) -> str:
    return f"\\fB{_roff(text)}\\fR"


def _italic(text: str) -> str:
    return f"\\fI{_roff(text)}\\fR"


def _synopsis(name: str, parser: argparse.ArgumentParser) -> str:
    """A command with its arguments on a line."""
    parts = [_bold(name)]
    groups = {
        id(action): group
        for group in parser._mutually_exclusive_groups
        for action in group._group_actions
    }
    done: set[int] = set()
    for action in _options(parser):
        if isinstance(action, argparse._HelpAction) or id(action) in done:
            continue
        group = groups.get(id(action))
        members = group._group_actions if group else [action]
        done |= {id(member) for member in members}
        text = " | ".join(_usage(member) for member in members)
        required = group.required if group else action.required
        parts.append(f"{{{text}}}" if required and group else text if required else f"[{text}]")
    for action in _positionals(parser):
        if id(action) in done:
            continue
        shown = _italic(str(action.metavar))
        more = f"{shown} ..." if action.nargs in ("+", "*") else shown
        parts.append(f"[{more}]" if action.nargs in ("?", "*") else more)
    return " ".join(parts)


def _usage(action: argparse.Action) -> str:
    value = f" {_italic(str(action.metavar))}" if _takes_value(action) else ""
    if not action.option_strings:
        return _italic(str(action.metavar))
    return _bold(action.option_strings[-1]) + value


def _arguments(parser: argparse.ArgumentParser) -> list[str]:
    lines = []
    for action in [*_positionals(parser), *_options(parser)]:
        if isinstance(action, argparse._HelpAction):
            continue
        head = _usage(action) if action.option_strings else _italic(str(action.metavar))
        about = (action.help or "") % {"default": action.default}
        lines += [".TP", head, _roff(about[:1].upper() + about[1:] + ".")]
    return lines


def manual(program: Program) -> str:
    """The manual page of a program, in roff."""
    parsers = leaves(parser_of(program))
    by_name = {command.name: command for command in program.commands}
    lines = [
        ".\\\" Made by dm_remap's cli.documentation.",
        f'.TH {program.name.upper().replace("-", chr(92) + "-")} {SECTION} "" "dm_remap.storage"',
        ".SH NAME",
        f"{_roff(program.name)} \\- {_roff(program.help[:1].lower() + program.help[1:])}",
        ".SH SYNOPSIS",
        # Neither hyphens nor wide gaps in command lines.
        ".nh",
        ".ad l",
    ]
    for words, parser in parsers.items():
        lines += [_synopsis(f"{program.name} {words}".strip(), parser), ".br"]
    lines[-1:] = [".hy", ".ad b"]
    lines += [".SH DESCRIPTION", _roff(f"{program.help}.")]
    for paragraph in program.description:
        lines += [".PP", _roff(paragraph)]
    if program.single:
        lines += [".SH OPTIONS", *_arguments(parsers[""])]
    else:
        lines.append(".SH COMMANDS")
        for words, parser in parsers.items():
            lines += _section(words, by_name[words], parser)
    lines.append(".SH EXIT STATUS")
    for code, text in EXIT_TEXTS.items():
        lines += [".TP", _bold(str(int(code))), _roff(text)]
    if program.files:
        lines.append(".SH FILES")
        for path, about in program.files.items():
            lines += [".TP", _italic(path), _roff(about[:1].upper() + about[1:] + ".")]
    examples = [example for command in program.commands for example in command.examples]
    if examples:
        lines.append(".SH EXAMPLES")
        for line, about in examples:
            lines += [".TP", _bold(line), _roff(about)]
    others = [f"{_bold(name)}({SECTION})" for name in PROGRAMS if name != program.name]
    lines += [".SH SEE ALSO", ", ".join([*others, f"{_bold('dmsetup')}({SECTION})"])]
    return "\n".join(lines) + "\n"


def _section(words: str, command: Command, parser: argparse.ArgumentParser) -> list[str]:
    lines = [f'.SS "{_roff(words)}"', _roff(f"{command.help}.")]
    for paragraph in command.description:
        lines += [".PP", _roff(paragraph)]
    return [*lines, *_arguments(parser)]
