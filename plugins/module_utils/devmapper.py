# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Device-mapper through libdevmapper: the only module that creates, loads and swaps tables."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable

from .errors import DmRemapError, MissingKernelFeature, Refused

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,95}\Z")

_CREATE, _RELOAD, _REMOVE = 0, 1, 2
_SUSPEND, _RESUME, _INFO, _DEPS = 4, 5, 6, 7
_VERSION, _STATUS, _TABLE, _LIST, _CLEAR = 9, 10, 11, 13, 14
_LIST_VERSIONS, _MESSAGE = 16, 17

# libdevmapper's buffer for answers, and the most that a linear line needs there: struct
# dm_target_spec of linux/dm-ioctl.h, "major:minor sector" and padding.
_ANSWER_BYTES = 16 * 1024
_LINE_BYTES = 40 + 48

_SWAP_BEGINS_SECONDS = 0.02
_IDLE_SECONDS = 0.002

_QUEUE_TIMEOUT = "/sys/module/dm_multipath/parameters/queue_if_no_path_timeout_secs"

_UDEV_DISABLE_DISK_RULES = 0x0004
_UDEV_DISABLE_OTHER_RULES = 0x0008
# Private devices get a node, but no by-uuid links and no probing by other subsystems.
_UDEV_PRIVATE = _UDEV_DISABLE_DISK_RULES | _UDEV_DISABLE_OTHER_RULES


@dataclass(frozen=True)
class Segment:
    """One line of a device-mapper table.

    Args:
        start: first sector of the segment on the mapped device.
        length: sectors.
        target: kernel target name, such as ``linear``.
        params: the target's parameters as the kernel takes and shows them.
    """

    start: int
    length: int
    target: str
    params: str

    def __str__(self) -> str:
        return f"{self.start} {self.length} {self.target} {self.params}".rstrip()


@dataclass(frozen=True)
class MappedDevice:
    """State of one mapped device, from ``DM_DEV_STATUS`` (linux/dm-ioctl.h)."""

    name: str
    uuid: str
    major: int
    minor: int
    suspended: bool
    open_count: int
    live_table: bool
    inactive_table: bool

    @property
    def devno(self) -> str:
        """The device number as ``major:minor``."""
        return f"{self.major}:{self.minor}"

    @property
    def node(self) -> str:
        """The kernel's own node for the device."""
        return f"/dev/dm-{self.minor}"


class _DmInfo(ctypes.Structure):
    # struct dm_info of libdevmapper.h, with room for fields that later versions append.
    _fields_ = [
        ("exists", ctypes.c_int),
        ("suspended", ctypes.c_int),
        ("live_table", ctypes.c_int),
        ("inactive_table", ctypes.c_int),
        ("open_count", ctypes.c_int32),
        ("event_nr", ctypes.c_uint32),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("read_only", ctypes.c_int),
        ("target_count", ctypes.c_int32),
        ("deferred_remove", ctypes.c_int),
        ("internal_suspend", ctypes.c_int),
        ("reserved", ctypes.c_int * 16),
    ]


class _DmNames(ctypes.Structure):
    # struct dm_names of libdevmapper.h: `next` is the byte offset of the next entry, 0 at the end.
    _fields_ = [("dev", ctypes.c_uint64), ("next", ctypes.c_uint32)]


class _DmVersions(ctypes.Structure):
    # struct dm_versions of libdevmapper.h, followed by the target's name.
    _fields_ = [("next", ctypes.c_uint32), ("version", ctypes.c_uint32 * 3)]


def _load_library() -> Any:
    try:
        library = ctypes.CDLL("libdevmapper.so.1.02.1", use_errno=True)
    except OSError as error:
        raise MissingKernelFeature(
            "libdevmapper is not installed",
            remedy="install the package libdevmapper1.02.1 (device-mapper-libs on other systems)",
        ) from error
    task = ctypes.c_void_p
    text = ctypes.c_char_p
    u32_pointer = ctypes.POINTER(ctypes.c_uint32)
    u64 = ctypes.c_uint64
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "dm_task_create": (task, [ctypes.c_int]),
        "dm_task_destroy": (None, [task]),
        "dm_task_set_name": (ctypes.c_int, [task, text]),
        "dm_task_set_uuid": (ctypes.c_int, [task, text]),
        "dm_task_add_target": (ctypes.c_int, [task, u64, u64, text, text]),
        "dm_task_run": (ctypes.c_int, [task]),
        "dm_task_get_errno": (ctypes.c_int, [task]),
        "dm_task_get_info": (ctypes.c_int, [task, ctypes.c_void_p]),
        "dm_task_get_uuid": (text, [task]),
        "dm_task_get_names": (ctypes.c_void_p, [task]),
        "dm_task_get_versions": (ctypes.c_void_p, [task]),
        "dm_task_get_deps": (ctypes.c_void_p, [task]),
        "dm_task_set_cookie": (ctypes.c_int, [task, u32_pointer, ctypes.c_uint16]),
        "dm_udev_wait": (ctypes.c_int, [ctypes.c_uint32]),
        "dm_udev_complete": (ctypes.c_int, [ctypes.c_uint32]),
        "dm_task_skip_lockfs": (ctypes.c_int, [task]),
        "dm_task_retry_remove": (ctypes.c_int, [task]),
        "dm_task_set_sector": (ctypes.c_int, [task, u64]),
        "dm_task_set_message": (ctypes.c_int, [task, text]),
        "dm_task_get_message_response": (text, [task]),
        "dm_get_next_target": (
            ctypes.c_void_p,
            [
                task,
                ctypes.c_void_p,
                ctypes.POINTER(u64),
                ctypes.POINTER(u64),
                ctypes.POINTER(text),
                ctypes.POINTER(text),
            ],
        ),
        "dm_log_with_errno_init": (None, [ctypes.c_void_p]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    # Errors are raised with their errno, so the library need not print them. A function of libc
    # that ignores its arguments serves as the log, because the library also logs when the process
    # ends, where calling into Python would crash.
    library.dm_log_with_errno_init(ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p))
    return library


def check_name(name: str) -> str:
    """Return ``name`` if it can be a target's name.

    Raises:
        Refused: for anything but 1 to 96 of ``A-Z a-z 0-9 . _ + -``, first one alphanumeric.
    """
    if not NAME_PATTERN.match(name):
        raise Refused(
            "not a valid target name",
            device=repr(name),
            remedy="use 1 to 96 of the characters A-Z a-z 0-9 . _ + -, the first a letter or digit",
        )
    return name


class DeviceMapper:
    """Commands to the kernel's device-mapper.

    Raises:
        MissingKernelFeature: libdevmapper or the kernel's device-mapper is not there.
        DmRemapError: a command was refused; the message names the device and the errno.
    """

    def __init__(self) -> None:
        self._library = _load_library()

    def check_available(self, targets: Iterable[str] = ()) -> None:
        """Check that the kernel answers and knows ``targets``, loading modules where needed."""
        try:
            with self._task(_VERSION, "device-mapper") as task:
                self._run(task, "device-mapper", "query the version of")
        except DmRemapError as error:
            raise MissingKernelFeature(
                "the kernel's device-mapper does not answer",
                device="/dev/mapper/control",
                remedy="run as root on a kernel with device-mapper (modprobe dm-mod)",
            ) from error
        known = self.kernel_targets()
        for target in targets:
            if target not in known:
                raise MissingKernelFeature(
                    f"the kernel has no device-mapper target {target!r}",
                    remedy=f"load it with modprobe dm-{target}",
                )

    def kernel_targets(self) -> dict[str, tuple[int, int, int]]:
        """Versions of the target types that the kernel has loaded, by name."""
        with self._task(_LIST_VERSIONS, "device-mapper") as task:
            self._run(task, "device-mapper", "list the targets of")
            address = self._library.dm_task_get_versions(task)
            found = {}
            while address:
                entry = _DmVersions.from_address(address)
                name = ctypes.string_at(address + ctypes.sizeof(_DmVersions)).decode()
                found[name] = (entry.version[0], entry.version[1], entry.version[2])
                address = address + entry.next if entry.next else None
            return found

    def names(self) -> list[str]:
        """Names of all mapped devices on the host."""
        with self._task(_LIST, "device-mapper") as task:
            self._run(task, "device-mapper", "list the devices of")
            address = self._library.dm_task_get_names(task)
            found: list[str] = []
            # An empty list is one entry with device number 0.
            while address and _DmNames.from_address(address).dev:
                entry = _DmNames.from_address(address)
                found.append(ctypes.string_at(address + 12).decode())
                address = address + entry.next if entry.next else None
            return found

    def info(self, name: str) -> MappedDevice | None:
        """State of the mapped device ``name``, or None where there is none."""
        with self._task(_INFO, name) as task:
            self._run(task, name, "query")
            info = self._info_of(task)
            if not info.exists:
                return None
            uuid = self._library.dm_task_get_uuid(task) or b""
            return MappedDevice(
                name=name,
                uuid=uuid.decode(),
                major=info.major,
                minor=info.minor,
                suspended=bool(info.suspended),
                open_count=info.open_count,
                live_table=bool(info.live_table),
                inactive_table=bool(info.inactive_table),
            )

    def table(self, name: str) -> list[Segment]:
        """The live table of ``name``, as the kernel shows it."""
        return self._segments(_TABLE, name)

    def status(self, name: str) -> list[Segment]:
        """The live status of ``name``; ``params`` holds each target's status line."""
        return self._segments(_STATUS, name)

    def create(self, name: str, uuid: str, segments: Iterable[Segment], private: bool) -> None:
        """Create ``name`` with a live table; nothing remains if a step fails.

        Args:
            name: name of the mapped device.
            uuid: its device-mapper UUID.
            segments: its table.
            private: udev makes a node but leaves the content alone.
        """
        with self._task(_CREATE, name) as task:
            self._check(self._library.dm_task_set_uuid(task, uuid.encode()), name, "name")
            # Only resume, remove and rename make an event that a cookie could wait for.
            self._run(task, name, "create")
        try:
            self.load(name, segments)
            with self._task(_RESUME, name) as task:
                self._run_with_udev(task, name, "activate", private)
        except BaseException:
            self.remove(name)
            raise

    def create_unannounced(self, name: str, uuid: str, segments: Iterable[Segment]) -> None:
        """Create ``name`` with a live table without waiting for udev (80 ms and more)."""
        with self._task(_CREATE, name) as task:
            self._check(self._library.dm_task_set_uuid(task, uuid.encode()), name, "name")
            self._run(task, name, "create")
        try:
            self.load(name, segments)
            self.swap(name)
        except BaseException:
            self.remove_unannounced(name)
            raise

    def load(self, name: str, segments: Iterable[Segment]) -> None:
        """Load ``segments`` as the inactive table of ``name``; the live table stays."""
        with self._task(_RELOAD, name) as task:
            for segment in segments:
                added = self._library.dm_task_add_target(
                    task,
                    segment.start,
                    segment.length,
                    segment.target.encode(),
                    segment.params.encode(),
                )
                self._check(added, name, "build a table for")
            self._run(task, name, "load a table into")

    def clear(self, name: str) -> None:
        """Drop the inactive table of ``name``."""
        self._simple(_CLEAR, name, "clear the inactive table of")

    def swap(self, name: str, events: Any = None) -> None:
        """Make the loaded table live: suspend, swap and resume in one call of the kernel.

        In-flight I/O is waited for; a filesystem above is not frozen, because its write-back
        would go through the table that is being replaced.

        Args:
            name: the mapped device.
            events: what `events` gave. A device that udev knows needs it, because for an event
                that nobody waits for libdevmapper makes udev take the device's links away.
        """
        with self._task(_RESUME, name) as task:
            self._library.dm_task_skip_lockfs(task)
            if events is not None:
                cookie_set = self._library.dm_task_set_cookie(task, ctypes.byref(events), 0)
                self._check(cookie_set, name, "announce")
            self._run(task, name, "resume")

    def swap_while(self, name: str, meanwhile: Callable[[], None], events: Any = None) -> None:
        """Like `swap`, for a device with I/O in flight that only ``meanwhile`` brings to an end.

        New I/O waits until the table is live, as in every swap, and so also while that is called.

        Args:
            name: the mapped device.
            meanwhile: called again and again until the swap is done.
            events: what `events` gave.
        """
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.swap(name, events)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run, name=f"swap of {name}", daemon=True)
        thread.start()
        # By then new I/O waits, for which the kernel takes some microseconds: no command tells.
        thread.join(_SWAP_BEGINS_SECONDS)
        while thread.is_alive():
            meanwhile()
            thread.join(_SWAP_BEGINS_SECONDS)
        if failures:
            raise failures[0]

    def wait_idle(self, name: str, seconds: float) -> bool:
        """Wait until no I/O of ``name`` is in flight; whether that came within ``seconds``.

        Source: the file ``inflight`` of Documentation/ABI/stable/sysfs-block.
        """
        device = self.info(name)
        if device is None:
            return True
        end = time.monotonic() + seconds
        while True:
            with open(f"/sys/dev/block/{device.devno}/inflight", encoding="ascii") as file:
                if not any(int(number) for number in file.read().split()):
                    return True
            if time.monotonic() >= end:
                return False
            time.sleep(_IDLE_SECONDS)

    @contextmanager
    def events(self) -> Iterator[Any]:
        """Collect the events of swaps, and wait for udev at the end instead of in each swap."""
        cookie = ctypes.c_uint32(0)
        yield cookie
        # Not after an error: a device may be left suspended then, and udev would wait for it.
        if cookie.value:
            self._library.dm_udev_wait(cookie)

    def suspend(self, name: str) -> None:
        """Hold new I/O to ``name`` and wait for what is in flight; no filesystem freeze."""
        with self._task(_SUSPEND, name) as task:
            self._library.dm_task_skip_lockfs(task)
            self._run(task, name, "suspend")

    def remove(self, name: str) -> None:
        """Remove ``name`` and wait until udev has removed its node."""
        with self._task(_REMOVE, name) as task:
            self._library.dm_task_retry_remove(task)
            self._run_with_udev(task, name, "remove", private=True)

    def remove_unannounced(self, name: str) -> None:
        """Remove a device made by `create_unannounced`."""
        with self._task(_REMOVE, name) as task:
            # Programs that look at every new device, such as udev, may have it open for a moment.
            self._library.dm_task_retry_remove(task)
            self._run(task, name, "remove")

    def message(self, name: str, text: str, sector: int = 0) -> str:
        """Send a message to the target at ``sector`` of ``name``; the answer, or ``""``."""
        with self._task(_MESSAGE, name) as task:
            self._check(self._library.dm_task_set_sector(task, sector), name, "address")
            self._check(self._library.dm_task_set_message(task, text.encode()), name, "address")
            self._run(task, name, "send a message to")
            response = self._library.dm_task_get_message_response(task)
            return response.decode() if response else ""

    def arm_queue_timeout(self, seconds: int) -> int:
        """Limit how long multipath devices hold I/O, unless there is a limit; the one that holds.

        It is one for the host (queue_if_no_path_timeout_secs of dm-multipath), so what somebody
        else set stays.

        Raises:
            MissingKernelFeature: the module is not loaded, or has no such limit.
        """
        try:
            with open(_QUEUE_TIMEOUT, encoding="ascii") as file:
                present = int(file.read())
            if present:
                return present
            with open(_QUEUE_TIMEOUT, "w", encoding="ascii") as file:
                file.write(str(seconds))
        except OSError as error:
            raise MissingKernelFeature(
                f"held I/O cannot be given a limit: {error.strerror}",
                device=_QUEUE_TIMEOUT,
                remedy="load dm-multipath of Linux 5.4 or newer, or use on_error: fail",
            ) from error
        return seconds

    def dependencies(self, name: str) -> list[str]:
        """Device numbers (``major:minor``) that the live table of ``name`` uses."""
        with self._task(_DEPS, name) as task:
            self._run(task, name, "query the devices of")
            address = self._library.dm_task_get_deps(task)
            if not address:
                return []
            # struct dm_deps: count, filler, then count 64-bit device numbers.
            count = ctypes.c_uint32.from_address(address).value
            numbers = (ctypes.c_uint64 * count).from_address(address + 8)
            return [f"{os.major(number)}:{os.minor(number)}" for number in numbers]

    @contextmanager
    def _task(self, kind: int, name: str) -> Iterator[Any]:
        task = self._library.dm_task_create(kind)
        if not task:
            raise MissingKernelFeature(
                "the kernel's device-mapper does not answer",
                device="/dev/mapper/control",
                remedy="run as root on a kernel with device-mapper (modprobe dm-mod)",
            )
        try:
            if kind not in (_LIST, _VERSION, _LIST_VERSIONS):
                self._check(self._library.dm_task_set_name(task, name.encode()), name, "name")
            yield task
        finally:
            self._library.dm_task_destroy(task)

    def _simple(self, kind: int, name: str, verb: str) -> None:
        with self._task(kind, name) as task:
            self._run(task, name, verb)

    def _run(self, task: Any, name: str, verb: str) -> None:
        if not self._library.dm_task_run(task):
            code = self._library.dm_task_get_errno(task) or errno.EIO
            raise DmRemapError(
                f"device-mapper could not {verb} the device: {os.strerror(code)}",
                device=name,
                remedy="the kernel log (dmesg) has the reason",
            )

    def _run_with_udev(self, task: Any, name: str, verb: str, private: bool) -> None:
        cookie = ctypes.c_uint32(0)
        flags = _UDEV_PRIVATE if private else 0
        self._check(
            self._library.dm_task_set_cookie(task, ctypes.byref(cookie), flags), name, "announce"
        )
        try:
            self._run(task, name, verb)
        finally:
            # The library notifies the semaphore itself when the command failed.
            self._library.dm_udev_wait(cookie)

    def _info_of(self, task: Any) -> _DmInfo:
        info = _DmInfo()
        self._library.dm_task_get_info(task, ctypes.byref(info))
        return info

    def _segments(self, kind: int, name: str) -> list[Segment]:
        with self._task(_INFO, name) as task:
            self._run(task, name, "query")
            lines = self._info_of(task).target_count
        with self._task(kind, name) as task:
            if lines * _LINE_BYTES > _ANSWER_BYTES:
                # A message has no meaning here but room for the answer. Without it the library
                # doubles its buffer, and from then on that of each command: a load of 20,000 lines
                # took 170 MB after their table was read once.
                room = b"." * (lines * _LINE_BYTES)
                self._check(self._library.dm_task_set_message(task, room), name, "prepare")
            self._run(task, name, "read the table of")
            start, length = ctypes.c_uint64(), ctypes.c_uint64()
            target, params = ctypes.c_char_p(), ctypes.c_char_p()
            found: list[Segment] = []
            following = None
            while True:
                following = self._library.dm_get_next_target(
                    task,
                    following,
                    ctypes.byref(start),
                    ctypes.byref(length),
                    ctypes.byref(target),
                    ctypes.byref(params),
                )
                if target.value is not None:
                    found.append(
                        Segment(
                            start.value,
                            length.value,
                            target.value.decode(),
                            (params.value or b"").decode(),
                        )
                    )
                if not following:
                    return found

    @staticmethod
    def _check(result: int, name: str, verb: str) -> None:
        if not result:
            raise DmRemapError(f"libdevmapper could not {verb} the device", device=name)
