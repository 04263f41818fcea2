# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copies of which one side is a stream: in order, and by the calling thread alone."""

from __future__ import annotations

from io import FileIO
from time import monotonic

from nbd._core.ends import Disk, File, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from nbd._core.copying import Settings
    from nbd._core.ends import End

_CHUNK = 1024 * 1024
_TICK = 0.1


def copy_stream(source: End, target: End, settings: Settings) -> tuple[int, int]:
    """Copy everything.

    Returns:
        How many bytes were copied, and how many were zeroed.
    """
    copied = zeroed = 0
    reported_at = 0.0
    write, close = _writer(target, settings)
    try:
        for chunk, is_hole in _chunks(source, settings):
            settings.check()
            _write_all(write, chunk)
            if is_hole:
                zeroed += len(chunk)
            else:
                copied += len(chunk)
            if settings.progress is not None and monotonic() - reported_at >= _TICK:
                reported_at = monotonic()
                settings.progress(copied + zeroed, source.size)
    finally:
        close()
    if settings.progress is not None:
        settings.progress(copied + zeroed, source.size)
    return copied, zeroed


def _chunks(source: End, settings: Settings) -> Iterator[tuple[memoryview, bool]]:
    """The bytes of a source in order, and whether they are a hole."""
    if isinstance(source, Stream):
        yield from _chunks_of_object(source.file)
    elif isinstance(source, File):
        with FileIO(source.fd, closefd=False) as file:
            yield from _chunks_between_holes(file, source.base, source, settings)
    else:
        from nbd._core.file import open as open_disk

        with open_disk(source.handles[0], buffering=0, timeout=settings.timeout) as file:
            yield from _chunks_between_holes(file, 0, source, settings)


def _chunks_between_holes(
    file: Any, base: int, source: Disk | File, settings: Settings
) -> Iterator[tuple[memoryview, bool]]:
    """The same of a file object that begins at `base`; the holes of its source are not read."""
    at = 0
    zeroes = memoryview(bytes(_CHUNK))
    buffer = memoryview(bytearray(_CHUNK))
    for start, stop in source.zeroes(0, source.size, 0) if settings.sparse else ():
        yield from _read(file, base, at, start, buffer)
        for hole in range(start, stop, _CHUNK):
            yield zeroes[: stop - hole], True
        at = stop
    yield from _read(file, base, at, source.size, buffer)


def _read(
    file: Any, base: int, start: int, stop: int, buffer: memoryview
) -> Iterator[tuple[memoryview, bool]]:
    while start < stop:
        file.seek(base + start)
        count = file.readinto(buffer[: stop - start])
        if not count:
            return  # the file is shorter than it was
        yield buffer[:count], False
        start += count


def _chunks_of_object(file: Any) -> Iterator[tuple[memoryview, bool]]:
    """The rest of a caller's file object."""
    while True:
        data = file.read(_CHUNK)
        if data is None:
            raise BlockingIOError("nbd.copy: the source does not wait for data; make it blocking")
        if not data:
            return
        yield memoryview(data).cast("B"), False


def _writer(
    target: End, settings: Settings
) -> tuple[Callable[[memoryview], Any], Callable[[], None]]:
    """A function that writes the next bytes to a target, and one that ends it."""
    if isinstance(target, Stream):
        return target.file.write, _nothing
    if isinstance(target, File):
        target.grow(0)
        file: Any = FileIO(target.fd, "w", closefd=False)
        file.seek(target.base)
        return file.write, file.close
    from nbd._core.file import open as open_disk

    file = open_disk(target.handles[0], "wb", buffering=0, timeout=settings.timeout)
    return file.write, file.close


def _nothing() -> None:
    pass


def _write_all(write: Callable[[memoryview], Any], data: memoryview) -> None:
    while data:
        count = write(data)
        if count is None:
            raise BlockingIOError("nbd.copy: the target takes no more data; make it blocking")
        data = data[count:]
