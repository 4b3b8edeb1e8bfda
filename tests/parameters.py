# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which parameters of a test run always, and which in ``make soak`` only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def short_form(values: Iterable[Any], always: Collection[Any]) -> list[ParameterSet]:
    """Parameters of a test, of which all but ``always`` are for the long runs.

    Args:
        values: all of them; tuples for a test that has several.
        always: those that run each time; each must be one of ``values``.
    """
    values = list(values)
    unknown = [value for value in always if value not in values]
    if unknown:
        raise ValueError(f"not among the parameters: {unknown}")
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in always else [pytest.mark.soak],
        )
        for value in values
    ]
