# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy reads a source that is costly to seek once, from its beginning to its end."""

from __future__ import annotations

import array
import bz2
import gzip
import io
import lzma
import random
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from support.servers import Server, StartServer
from support.sizes import MIB

import nbd
from nbd._disks.queue import SOURCE
from nbd._disks.streamendpoint import Stream

CONTENT = random.Random(1).randbytes(MIB // 2) + bytes(MIB // 2) + b"the rest"

FORMATS = [
    pytest.param(lambda file: gzip.GzipFile(fileobj=file), gzip.compress, id="gzip"),
    pytest.param(bz2.BZ2File, bz2.compress, id="bz2"),
    pytest.param(lzma.LZMAFile, lzma.compress, id="lzma"),
]


class Counting(io.BytesIO):
    """A file that counts what is read, and the seeks that move."""

    count = 0
    seeks = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        before = self.tell()
        after = super().seek(offset, whence)
        self.seeks += before != after
        return after


@pytest.fixture
def target(nbdkit: StartServer) -> Server:
    """Return a server with room for the content."""
    return nbdkit("memory", "2M")


def copied(target: Server) -> bytes:
    """Return what was copied."""
    with nbd.open(target.uri) as disk:
        return disk.read(len(CONTENT))


@pytest.mark.parametrize("is_buffered", [False, True])
@pytest.mark.parametrize(("opened", "compress"), FORMATS)
def test_a_compressed_source_is_read_once(
    target: Server, opened: Callable[..., Any], compress: Callable[..., bytes], is_buffered: bool
) -> None:
    file = Counting(compress(CONTENT))
    length = len(file.getvalue())
    source = opened(file)
    if is_buffered:
        source = io.BufferedReader(source)
    assert nbd.copy(source, target.uri).read == len(CONTENT)
    assert (file.count, file.seeks) == (length, 0)
    assert copied(target) == CONTENT
    assert source.read() == b""


class Seekable(Counting):
    """An object of the program, which can be sought."""


@pytest.mark.parametrize("make", [Seekable, lambda data: io.BufferedReader(Raw(data))])
def test_a_seekable_object_of_the_program_is_read_once(
    target: Server, make: Callable[..., Any]
) -> None:
    source = make(CONTENT)
    counted = getattr(source, "raw", source)
    assert nbd.copy(source, target.uri).read == len(CONTENT)
    assert (counted.count, counted.seeks) == (len(CONTENT), 0)
    assert copied(target) == CONTENT


class Raw(io.RawIOBase):
    """A raw file that counts what is read, and its seeks."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.count = self.seeks = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.count += count
        return count

    def seek(self, offset: int, whence: int = 0, /) -> int:
        # io.BufferedReader asks for the position when it is made.
        self.seeks += (offset, whence) != (0, io.SEEK_CUR)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def test_an_overridden_read_of_a_subclass_is_called(target: Server) -> None:
    class Inverted(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            return bytes(255 - byte for byte in super().read(-1 if size is None else size))

    source = Inverted(fileobj=io.BytesIO(gzip.compress(b"\0\1\2")))
    assert nbd.copy(source, target.uri) == (3, 0)
    with nbd.open(target.uri) as disk:
        assert disk.read(3) == b"\xff\xfe\xfd"


def test_progress_knows_the_size_of_a_bytesio(target: Server) -> None:
    calls: list[tuple[int, int | None]] = []
    source = io.BytesIO(b"before" + CONTENT)
    source.seek(6)
    nbd.copy(source, target.uri, progress=lambda *numbers: calls.append(numbers))
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert source.tell() == 6 + len(CONTENT)


def as_array(data: bytes) -> array.array[int]:
    """Return an array whose items are larger than a byte."""
    return array.array("I", data)


@pytest.mark.parametrize("convert", [bytearray, memoryview, as_array])
def test_a_read_may_return_other_memory_than_bytes(
    nbdkit: StartServer, convert: Callable[[bytes], Any]
) -> None:
    """PyPy would copy a view that was cast byte by byte, so it gets bytes."""
    file = io.BytesIO(CONTENT[: 1 << 20])

    class Source:
        def read(self, size: int) -> Any:
            return convert(file.read(size))

    settings: Any = None  # they are not used
    chunks = list(Stream(Source(), SOURCE, settings).chunks())
    assert b"".join(chunks) == file.getvalue()
    if sys.implementation.name == "pypy":
        assert {type(chunk) for chunk in chunks} == {bytes}
    file.seek(0)
    server = nbdkit("memory", "1M")
    assert nbd.copy(Source(), server.uri).read == MIB
    with nbd.open(server.uri) as disk:
        assert disk.read() == file.getvalue()


def test_memory_that_has_gaps_is_refused(tmp_path: Path) -> None:
    class Source:
        def read(self, size: int) -> Any:
            return memoryview(b"abcd")[::2]

    with pytest.raises(TypeError, match=r"its read\(\) has returned memoryview, not bytes"):
        nbd.copy(Source(), tmp_path / "copied")
