# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A generation of metadata as JSON that people can read, and back without a difference (pure).

docs/tools.md describes the document. Its digest is that of the generation, so a dump that was
changed afterwards is recognised.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from .errors import DmRemapError, Refused
from .format import Extent, LostRange, Metadata, load_json

KIND = "dm-remap metadata"
VERSION = 1
# Escapes take up to six characters for a byte of a body.
MAX_CHARACTERS = 8 << 20

_KEYS = (
    "kind version target_uuid generation timestamp_ns host_id parent_digest digest config health "
    "extents lost history unknown_sections"
).split()
_EXTENT = tuple(field.name for field in fields(Extent))
_LOST = tuple(field.name for field in fields(LostRange))
_ANCESTOR = ("generation", "digest")
_SECTION = ("type", "payload")


class BadDump(Refused):
    """A document that is no dump, or one that was changed."""


def to_document(metadata: Metadata) -> dict[str, Any]:
    """A generation as plain data.

    Raises:
        BadMetadata: the metadata contradicts itself.
    """
    return {
        "kind": KIND,
        "version": VERSION,
        "target_uuid": str(metadata.target_uuid),
        "generation": metadata.generation,
        "timestamp_ns": metadata.timestamp_ns,
        "host_id": str(metadata.host_id),
        "parent_digest": metadata.parent_digest.hex(),
        "digest": metadata.digest.hex(),
        "config": metadata.config,
        "health": metadata.health,
        "extents": [asdict(extent) for extent in metadata.extents],
        "lost": [asdict(lost) for lost in metadata.lost],
        "history": [
            dict(zip(_ANCESTOR, (generation, digest.hex())))
            for generation, digest in metadata.history
        ],
        "unknown_sections": [
            dict(zip(_SECTION, (number, base64.b64encode(payload).decode())))
            for number, payload in metadata.unknown_sections
        ],
    }


def to_text(metadata: Metadata) -> str:
    """A generation as JSON text."""
    return _text(to_document(metadata))


def from_text(text: str, name: str = "the dump") -> Metadata:
    """The generation that `to_text` has written.

    Args:
        text: the JSON text.
        name: how the document is called in messages.

    Raises:
        BadDump: it is no dump, or it was changed.
    """
    if len(text) > MAX_CHARACTERS:
        raise _bad(name, f"has more than {MAX_CHARACTERS} characters")
    try:
        document = load_json(text)
    except (ValueError, RecursionError) as error:
        raise _bad(name, f"is not JSON: {error}") from error
    return from_document(document, name)


def from_document(document: Mapping[str, Any], name: str = "the dump") -> Metadata:
    """The generation that `to_document` gave; arguments and errors as those of `from_text`."""
    if document.get("kind") != KIND:
        raise _bad(name, "is no dump of metadata")
    if document.get("version") != VERSION:
        raise _bad(name, f"is of version {document.get('version')!r}, not {VERSION}")
    if set(document) != set(_KEYS):
        odd = ", ".join(sorted(set(document) ^ set(_KEYS)))
        raise _bad(name, f"lacks these keys, or has them too many: {odd}")
    try:
        metadata = _metadata(document)
        unchanged = _text(to_document(metadata)) == _text(document)
    except DmRemapError as error:
        raise _bad(name, f"cannot be: {error.message}") from error
    except (
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
        binascii.Error,
    ) as error:
        raise _bad(name, f"is not as it was written: {error!r}") from error
    if not unchanged:
        raise _bad(name, "was changed: its content does not give the digest that it names")
    return metadata


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _metadata(document: Mapping[str, Any]) -> Metadata:
    for key in ("config", "health"):
        if not isinstance(document[key], dict):
            raise ValueError(f"{key} is no object")
    return Metadata(
        target_uuid=uuid.UUID(document["target_uuid"]),
        generation=_number(document["generation"]),
        timestamp_ns=_number(document["timestamp_ns"]),
        host_id=uuid.UUID(document["host_id"]),
        parent_digest=bytes.fromhex(document["parent_digest"]),
        config=document["config"],
        health=document["health"],
        extents=tuple(
            Extent(*map(_number, _values(item, _EXTENT))) for item in document["extents"]
        ),
        lost=tuple(LostRange(*map(_number, _values(item, _LOST))) for item in document["lost"]),
        unknown_sections=tuple(
            (_number(number), base64.b64decode(payload, validate=True))
            for number, payload in (_values(i, _SECTION) for i in document["unknown_sections"])
        ),
        history=tuple(
            (_number(generation), bytes.fromhex(digest))
            for generation, digest in (_values(i, _ANCESTOR) for i in document["history"])
        ),
    )


def _values(item: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    """The values of an entry that has these keys and no others."""
    if set(item) != set(keys):
        raise ValueError(f"{item!r} does not have the keys {', '.join(keys)}")
    return [item[key] for key in keys]


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _bad(name: str, message: str) -> BadDump:
    return BadDump(message, device=name, remedy="take the dump again, or use a host's backup")
