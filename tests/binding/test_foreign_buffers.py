"""Buffers of other modules: their bytes are read and written in place, or they are refused.

nbd.Buffer.from_buffer is a sequence of bytes, whatever the items of the underlying buffer are.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import sys
from typing import Any, Callable

import pytest
from support.handles import drain, finish
from support.programs import run_silently
from support.servers import StartServer

import nbd

try:
    import numpy
except ImportError:
    numpy = None

SIZE = 4096
PATTERN = bytes(range(1, 256)) * 16 + bytes(16)

Make = Callable[[], Any]


class Struct(ctypes.Structure):
    """A C struct of SIZE bytes."""

    _fields_ = (("first", ctypes.c_uint32), ("rest", ctypes.c_uint16 * (SIZE // 2 - 2)))


def of_numpy(make: Callable[[Any], Any]) -> Make:
    """Return a function that makes a numpy array, or skips the test."""

    def made() -> Any:
        if numpy is None:
            pytest.skip("numpy is not installed")
        return make(numpy)

    return made


def read_only(array: Any) -> Any:
    array.setflags(write=False)
    return array


WRITABLE: dict[str, Make] = {
    "bytearray": lambda: bytearray(SIZE),
    "array of bytes": lambda: array.array("B", bytes(SIZE)),
    "array of float": lambda: array.array("d", bytes(SIZE)),
    "mapping": lambda: mmap.mmap(-1, SIZE),
    "ctypes array of bytes": lambda: (ctypes.c_ubyte * SIZE)(),
    "ctypes array of char": lambda: (ctypes.c_char * SIZE)(),
    "ctypes array of arrays": lambda: (ctypes.c_uint32 * 32 * 32)(),
    "ctypes struct": Struct,
    "view": lambda: memoryview(bytearray(SIZE)),
    "view of part": lambda: memoryview(bytearray(2 * SIZE))[100 : 100 + SIZE],
    "view of ctypes": lambda: memoryview((ctypes.c_ubyte * SIZE)()),
    "view of integers": lambda: memoryview(bytearray(SIZE)).cast("I"),
    "view of rows": lambda: memoryview(bytearray(SIZE)).cast("B", (64, 64)),
    "view of rows of integers": lambda: memoryview(bytearray(SIZE)).cast("I", (4, 16, 16)),
    "numpy bytes": of_numpy(lambda np: np.zeros(SIZE, "u1")),
    "numpy floats": of_numpy(lambda np: np.zeros(SIZE // 8)),
    "numpy big-endian": of_numpy(lambda np: np.zeros(SIZE // 4, ">i4")),
    "numpy booleans": of_numpy(lambda np: np.zeros(SIZE, "?")),
    "numpy rows": of_numpy(lambda np: np.zeros((64, 64), "u1")),
    "numpy records": of_numpy(lambda np: np.zeros(SIZE // 8, [("a", "i4"), ("b", "i4")])),
    "numpy slice": of_numpy(lambda np: np.zeros((128, 64), "u1")[32:96]),
    "numpy dates": of_numpy(lambda np: np.zeros(SIZE // 8, "M8[s]")),
}
READ_ONLY: dict[str, Make] = {
    "bytes": lambda: bytes(SIZE),
    "view of bytes": lambda: memoryview(bytes(SIZE)),
    "read-only view": lambda: memoryview(bytearray(SIZE)).toreadonly(),
    "rows of bytes": lambda: memoryview(bytes(SIZE)).cast("B", (64, 64)),
    "mapping": lambda: mmap.mmap(-1, SIZE, prot=mmap.PROT_READ),
    "numpy": of_numpy(lambda np: read_only(np.zeros(SIZE, "u1"))),
}
WITH_GAPS: dict[str, Make] = {
    "every other byte": lambda: memoryview(bytearray(2 * SIZE))[::2],
    "backwards": lambda: memoryview(bytearray(SIZE))[::-1],
    "numpy column": of_numpy(lambda np: np.zeros((64, 128), "u1")[:, :64]),
    "numpy backwards": of_numpy(lambda np: np.zeros(SIZE, "u1")[::-1]),
    "numpy columns first": of_numpy(lambda np: np.zeros((64, 64), "u1", order="F")),
}
EMPTY: dict[str, Make] = {
    "bytearray": bytearray,
    "array of float": lambda: array.array("d"),
    "ctypes": lambda: (ctypes.c_ubyte * 0)(),
    "view": lambda: memoryview(bytearray(8))[8:],
    "no rows": lambda: memoryview(bytearray(8)).cast("B", (2, 4))[2:],
    "numpy rows of nothing": of_numpy(lambda np: np.zeros((2, 0), "u1")),
}


def contents(buffer: Any) -> bytes:
    """Return the bytes of any buffer; memoryview does not accept one of dates."""
    if numpy is not None and isinstance(buffer, numpy.ndarray):
        return bytes(buffer.tobytes())
    return memoryview(buffer).tobytes()


def fill(buffer: Any) -> None:
    """Put the pattern into a buffer."""
    if numpy is not None and isinstance(buffer, numpy.ndarray):
        buffer = buffer.view("u1")
    memoryview(buffer).cast("B")[:] = PATTERN


def every(made: dict[str, Make]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", made.values(), ids=made)


# ---- calls


@every(WRITABLE)
def test_a_read_fills_the_buffer(disk: nbd.NBD, make: Make) -> None:
    disk.pwrite(PATTERN, 0)
    buffer = make()
    finish(disk, disk.aio_pread(buffer, 0))
    assert contents(buffer) == PATTERN


@every(WRITABLE)
def test_a_structured_read_fills_the_buffer_and_shows_it(disk: nbd.NBD, make: Make) -> None:
    disk.pwrite(PATTERN, 0)
    buffer = make()
    shown: list[bytes] = []
    chunk: Any = lambda view, *rest: shown.append(view.tobytes())  # noqa: E731
    finish(disk, disk.aio_pread_structured(buffer, 0, chunk))
    assert (contents(buffer), b"".join(shown)) == (PATTERN, PATTERN)


@every(WRITABLE)
def test_a_write_takes_the_bytes(disk: nbd.NBD, make: Make) -> None:
    buffer = make()
    fill(buffer)
    disk.pwrite(buffer, 0)
    finish(disk, disk.aio_pwrite(buffer, SIZE))
    assert disk.pread(2 * SIZE, 0) == PATTERN * 2


@every(READ_ONLY)
def test_a_read_only_buffer_is_written_and_not_read_into(disk: nbd.NBD, make: Make) -> None:
    disk.pwrite(PATTERN, 0)
    buffer = make()
    with pytest.raises(BufferError, match=r"^buf: the buffer is read-only"):
        disk.aio_pread(buffer, 0)
    with pytest.raises(BufferError, match=r"^buf: the buffer is read-only"):
        disk.aio_pread_structured(buffer, 0, lambda *chunk: None)
    disk.pwrite(buffer, 0)
    finish(disk, disk.aio_pwrite(buffer, 0))
    assert disk.pread(SIZE, 0) == bytes(SIZE)


@every(WITH_GAPS)
def test_a_buffer_with_gaps_is_refused(disk: nbd.NBD, make: Make) -> None:
    buffer = make()
    calls: list[Callable[[], object]] = [
        lambda: disk.pwrite(buffer, 0),
        lambda: disk.aio_pwrite(buffer, 0),
        lambda: disk.aio_pread(buffer, 0),
        lambda: disk.aio_pread_structured(buffer, 0, lambda *chunk: None),
        lambda: nbd.Buffer.from_buffer(buffer),
    ]
    for call in calls:
        with pytest.raises(BufferError, match="the buffer is not contiguous"):
            call()
    assert disk.aio_in_flight() == 0


@every(WITH_GAPS)
def test_a_buffer_with_gaps_can_be_copied(make: Make) -> None:
    assert nbd.Buffer.from_bytearray(make()).is_zero()


@every(EMPTY)
def test_an_empty_buffer_is_an_error_of_libnbd(disk: nbd.NBD, make: Make) -> None:
    for call in (disk.pwrite, disk.aio_pwrite, disk.aio_pread):
        with pytest.raises(nbd.Error) as caught:
            call(make(), 0)
        assert caught.value.errno == "EINVAL"
    assert disk.aio_in_flight() == 0


def test_shared_memory_is_read_and_written_in_place(nbdkit: StartServer) -> None:
    # In a process of its own, because the module leaves a process running.
    program = """
import nbd, sys
from multiprocessing import shared_memory
data = bytes(range(256)) * 16
h = nbd.NBD()
h.connect_unix(sys.argv[1])
h.pwrite(data, 0)
memory = shared_memory.SharedMemory(create=True, size=len(data))
try:
    h.aio_pread(memory.buf, 0, lambda error: 1)
    while h.aio_in_flight():
        h.poll(-1)
    assert memory.buf == data
    h.pwrite(memory.buf, 4096)
    h.aio_pwrite(memory.buf, 8192, lambda error: 1)
    while h.aio_in_flight():
        h.poll(-1)
    assert h.pread(8192, 4096) == data * 2
    assert nbd.Buffer.from_buffer(memory.buf)[:] == data
finally:
    h.close()
    memory.close()
    memory.unlink()
"""
    run_silently(program, nbdkit("memory", "1M").socket)


@pytest.mark.parametrize(
    "make",
    [
        lambda: memoryview(bytearray(SIZE))[5:6:7],
        lambda: memoryview(bytearray(1))[::-1],
    ],
    ids=["step", "backwards"],
)
def test_a_view_whose_step_does_not_matter_is_read_and_written(disk: nbd.NBD, make: Make) -> None:
    view = make()
    disk.pwrite(PATTERN, 0)
    finish(disk, disk.aio_pread(view, 0))
    assert view.tobytes() == PATTERN[: view.nbytes]
    disk.pwrite(view, SIZE)
    assert disk.pread(view.nbytes, SIZE) == PATTERN[: view.nbytes]


# ---- nbd.Buffer.from_buffer

BYTES = {name: make for name, make in WRITABLE.items() if name != "numpy dates"}


@every(BYTES)
def test_the_buffer_has_the_bytes(make: Make) -> None:
    buffer = make()
    fill(buffer)
    shared = nbd.Buffer.from_buffer(buffer)
    assert (len(shared), shared.size(), shared.is_zero()) == (SIZE, SIZE, False)
    assert shared.to_bytearray() == bytes(shared) == PATTERN
    assert list(shared) == list(PATTERN)
    assert shared.to_buffer() is buffer


@every(BYTES)
def test_an_index_of_the_buffer_is_that_of_a_byte(make: Make) -> None:
    buffer = make()
    fill(buffer)
    shared = nbd.Buffer.from_buffer(buffer)
    for index in (0, 1, 254, SIZE - 1, -SIZE):
        assert shared[index] == PATTERN[index]
        assert type(shared[index]) is int
    with pytest.raises(IndexError):
        shared[SIZE]


@every(BYTES)
def test_a_slice_of_the_buffer_is_of_bytes(make: Make) -> None:
    buffer = make()
    fill(buffer)
    shared = nbd.Buffer.from_buffer(buffer)
    for part in (slice(3), slice(5, 9), slice(None, None, 7), slice(-3, None), slice(9, 5)):
        assert shared[part] == PATTERN[part]
        assert type(shared[part]) is bytearray


@every(BYTES)
def test_a_byte_of_the_buffer_can_be_set(make: Make) -> None:
    buffer = make()
    shared = nbd.Buffer.from_buffer(buffer)
    shared[1], shared[SIZE - 1] = 7, 255
    shared[2:4] = b"xy"
    assert contents(buffer) == b"\0\7xy" + bytes(SIZE - 5) + b"\xff"


@every(BYTES)
def test_the_buffer_is_read_and_written(disk: nbd.NBD, make: Make) -> None:
    disk.pwrite(PATTERN, 0)
    buffer = make()
    shared = nbd.Buffer.from_buffer(buffer)
    shown: list[bytes] = []
    chunk: Any = lambda view, *rest: shown.append(view.tobytes())  # noqa: E731
    finish(disk, disk.aio_pread_structured(shared, 0, chunk))
    assert (contents(buffer), b"".join(shown)) == (PATTERN, PATTERN)
    finish(disk, disk.aio_pwrite(shared, SIZE))
    disk.pwrite(shared, 2 * SIZE)
    assert disk.pread(2 * SIZE, SIZE) == PATTERN * 2


@every(READ_ONLY)
def test_the_buffer_of_read_only_memory_cannot_be_changed(disk: nbd.NBD, make: Make) -> None:
    shared = nbd.Buffer.from_buffer(make())
    with pytest.raises((TypeError, ValueError)):
        shared[0] = 1
    with pytest.raises((TypeError, ValueError)):
        shared[0:2] = b"xy"
    with pytest.raises(BufferError, match=r"^buf: the buffer is read-only"):
        disk.aio_pread(shared, 0)
    assert shared.is_zero()


@every(EMPTY)
def test_the_buffer_of_nothing_is_empty(make: Make) -> None:
    shared = nbd.Buffer.from_buffer(make())
    assert (len(shared), bytes(shared), list(shared), shared[:]) == (0, b"", [], b"")
    assert shared.is_zero()


@pytest.mark.parametrize(
    "value", [memoryview(b"abcd").cast("B", (2, 2)), array.array("H", b"abcd")], ids=["rows", "H"]
)
def test_a_slice_is_set_to_the_bytes_of_any_buffer(value: Any) -> None:
    buf = nbd.Buffer(8)
    buf[2:6] = value
    assert bytes(buf) == b"\0\0abcd\0\0"


def test_a_mapping_cannot_go_while_a_command_uses_it(disk: nbd.NBD) -> None:
    if sys.implementation.name == "pypy":
        pytest.skip("PyPy: a command in flight works on a copy")
    disk.pwrite(PATTERN, 0)
    memory = mmap.mmap(-1, SIZE)
    disk.aio_pread(memory, 0, lambda error: 1)
    with pytest.raises(BufferError):
        memory.close()
    drain(disk)
    assert memory[:] == PATTERN
    memory.close()
