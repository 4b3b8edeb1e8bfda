# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Copyright: dm_remap.storage contributors
"""A disk whose write cache is lost in a power cut: an NBD server that keeps writes until a flush.

QEMU says goodbye (NBD_CMD_DISC) when it ends in order, and not when it is killed. So a
connection that ends without a goodbye is a power cut: of the blocks written since the last
flush, each one reaches the image with the chosen probability, and the others keep their old
content. Protocol: the NBD project's doc/proto.md, fixed newstyle handshake, simple replies.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import socket
import struct
import sys
from pathlib import Path

INIT_MAGIC, OPTION_MAGIC, REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
FIXED_NEWSTYLE_NO_ZEROES = 3
OPT_EXPORT_NAME, OPT_ABORT, OPT_GO = 1, 2, 7
REP_ACK, REP_INFO, REP_ERR_UNSUP = 1, 3, (1 << 31) + 1
INFO_EXPORT = 0
# HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES
TRANSMISSION_FLAGS = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FLAG_FUA = 1


class Store:
    """An image behind a volatile write cache.

    Args:
        descriptor: the open image.
        block: bytes that are written whole or not at all.
        survive: probability, 0.0 to 1.0, that an unflushed block outlives a power cut.
        seed: makes the choice repeatable.
    """

    def __init__(self, descriptor: int, block: int, survive: float, seed: int) -> None:
        self._descriptor = descriptor
        self._block = block
        self._survive = survive
        self._random = random.Random(seed)
        self._pending: dict[int, bytes] = {}

    def read(self, offset: int, length: int) -> bytes:
        """Return what was last written, flushed or not."""
        data = bytearray(os.pread(self._descriptor, length, offset))
        data += bytes(length - len(data))
        first = offset // self._block
        for number in range(first, (offset + length) // self._block):
            block = self._pending.get(number)
            if block is not None:
                start = (number - first) * self._block
                data[start : start + self._block] = block
        return bytes(data)

    def write(self, offset: int, data: bytes, durable: bool = False) -> None:
        """Keep whole blocks in the cache; ``durable`` writes them through it."""
        first = offset // self._block
        view = memoryview(data)
        for number in range(len(data) // self._block):
            block = bytes(view[number * self._block : (number + 1) * self._block])
            self._pending[first + number] = block
        if durable:
            os.pwrite(self._descriptor, data, offset)
            for number in range(first, first + len(data) // self._block):
                del self._pending[number]

    def flush(self) -> None:
        """Make all writes durable."""
        for number, block in sorted(self._pending.items()):
            os.pwrite(self._descriptor, block, number * self._block)
        self._pending.clear()

    def power_cut(self) -> None:
        """Lose the cache, but for the blocks that chance lets survive."""
        for number in sorted(self._pending):
            if self._random.random() >= self._survive:
                del self._pending[number]
        self.flush()


class Connection:
    """One client's connection to a Store."""

    def __init__(self, link: socket.socket, store: Store, size: int, block: int) -> None:
        self._link = link
        self._store = store
        self._size = size
        self._block = block

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = self._link.recv(length - len(parts))
            if not part:
                raise ConnectionError("the client is gone")
            parts += part
        return bytes(parts)

    def _option_reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._link.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data)

    def negotiate(self) -> bool:
        """Shake hands; say whether the client wants the export."""
        self._link.sendall(INIT_MAGIC + OPTION_MAGIC + struct.pack(">H", FIXED_NEWSTYLE_NO_ZEROES))
        (flags,) = struct.unpack(">I", self._receive(4))
        while True:
            magic, option, length = struct.unpack(">8sII", self._receive(16))
            self._receive(length)
            if magic != OPTION_MAGIC or option == OPT_ABORT:
                return False
            if option == OPT_EXPORT_NAME:
                padding = b"" if flags & 2 else bytes(124)
                self._link.sendall(struct.pack(">QH", self._size, TRANSMISSION_FLAGS) + padding)
                return True
            if option == OPT_GO:
                info = struct.pack(">HQH", INFO_EXPORT, self._size, TRANSMISSION_FLAGS)
                self._option_reply(option, REP_INFO, info)
                self._option_reply(option, REP_ACK)
                return True
            self._option_reply(option, REP_ERR_UNSUP)

    def serve(self) -> None:
        """Answer requests until the client's goodbye; raises ConnectionError without one."""
        while True:
            magic, flags, kind, cookie, offset, length = REQUEST.unpack(self._receive(REQUEST.size))
            if magic != REQUEST_MAGIC:
                raise ConnectionError("the client does not speak NBD")
            if kind == CMD_DISC:
                return
            data = self._receive(length) if kind == CMD_WRITE else b""
            error, answer = self._handle(kind, offset, length, data, bool(flags & FLAG_FUA))
            head = struct.pack(">IIQ", SIMPLE_REPLY_MAGIC, error, cookie)
            self._link.sendall(head + answer)

    def _handle(
        self, kind: int, offset: int, length: int, data: bytes, durable: bool
    ) -> tuple[int, bytes]:
        """Carry out one request and return (error number, data)."""
        if kind == CMD_FLUSH:
            self._store.flush()
            return 0, b""
        if offset % self._block or length % self._block or offset + length > self._size:
            return errno.EINVAL, b""
        if kind == CMD_READ:
            return 0, self._store.read(offset, length)
        if kind == CMD_WRITE:
            self._store.write(offset, data, durable)
        elif kind == CMD_WRITE_ZEROES:
            self._store.write(offset, bytes(length), durable)
        elif kind != CMD_TRIM:
            return errno.EINVAL, b""
        return 0, b""


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at ``path``, which appears only when it does."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    listener.bind(str(temporary))
    listener.listen(4)
    temporary.rename(path)
    return listener


def main() -> int:
    """Serve one image until killed, one client after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--survive", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    descriptor = os.open(options.image, os.O_RDWR | os.O_CLOEXEC)
    size = os.fstat(descriptor).st_size
    store = Store(descriptor, options.block, options.survive, options.seed)
    with listen(options.socket) as listener:
        while True:
            link, _unused = listener.accept()
            with link:
                connection = Connection(link, store, size, options.block)
                try:
                    if connection.negotiate():
                        connection.serve()
                except ConnectionError:
                    store.power_cut()
                else:
                    store.flush()


if __name__ == "__main__":
    sys.exit(main())
