# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells the story on the terminal: scenes, facts, and a line that moves while work goes on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

_FRAMES = "|/-\\"
_QUIET_SECONDS = 15


class Teller:
    """Prints with the seconds since the beginning in front.

    Args:
        out: where to print; a terminal gets colours and a moving progress line.
    """

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._begun = time.monotonic()
        self._terminal = out.isatty()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    def scene(self, title: str) -> None:
        """Begin a part of the story."""
        self._out.write("\n" + self._styled("1", title) + "\n")
        self._out.flush()

    def say(self, text: str) -> None:
        """Print one fact."""
        self._out.write(f"{self.seconds:7.1f} s  {text}\n")
        self._out.flush()

    def show(self, lines: Sequence[str]) -> None:
        """Print lines as they are, set in."""
        for line in lines:
            self._out.write(f"           {line}\n")
        self._out.flush()

    def good(self, text: str) -> None:
        """Print a fact that is as it should be."""
        self.say(self._styled("32", "ok  ") + text)

    def bad(self, text: str) -> None:
        """Print a fault."""
        self.say(self._styled("31", "!!  ") + text)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Keep a line moving while something long goes on, then say how long it took."""
        begun = time.monotonic()
        ended = threading.Event()
        mover = threading.Thread(target=self._move, args=(what, begun, ended), daemon=True)
        mover.start()
        try:
            yield
        finally:
            ended.set()
            mover.join()
        self.say(f"{what}: {time.monotonic() - begun:.1f} s")

    def _move(self, what: str, begun: float, ended: threading.Event) -> None:
        turn = 0
        while not ended.wait(0.2 if self._terminal else _QUIET_SECONDS):
            turn += 1
            passed = time.monotonic() - begun
            if self._terminal:
                self._out.write(
                    f"\r{self.seconds:7.1f} s  {_FRAMES[turn % 4]} {what} {passed:.0f} s"
                )
            else:
                self._out.write(f"{self.seconds:7.1f} s  ... {what}, {passed:.0f} s so far\n")
            self._out.flush()
        if self._terminal:
            self._out.write("\r\033[K")

    def _styled(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._terminal else text
