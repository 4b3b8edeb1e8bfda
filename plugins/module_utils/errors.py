# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors that the core raises on purpose: what is wrong, on which device, what to do."""

from __future__ import annotations


class DmRemapError(Exception):
    """A refusal or failure that the user can act on.

    Args:
        message: what is wrong, in a sentence without a full stop.
        device: path or name of the device or target it is about.
        remedy: what would make it work, as an instruction.
    """

    def __init__(self, message: str, device: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.device = device
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.device}: {self.message}" if self.device else self.message
        return f"{text}; {self.remedy}" if self.remedy else text


class Refused(DmRemapError):
    """The request was refused before anything was written."""


class StaleGeneration(Refused):
    """The metadata is not at the generation that the caller expected."""


class MissingKernelFeature(DmRemapError):
    """The kernel or a library lacks something that the product needs."""


def count_of(number: int, noun: str) -> str:
    """A number with its noun, such as ``1 chunk`` or ``2 chunks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
