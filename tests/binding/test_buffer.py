"""nbd.Buffer: what it shares, what it copies, and that it never shows the bytes of another."""

from __future__ import annotations

import array
import copy
import gc
import mmap
import pickle
import sys
from typing import Any, Callable

import pytest
from support.handles import finish
from support.servers import StartServer

import nbd

METHODS = ["size", "is_zero", "to_buffer", "to_bytearray"]
SIZES = [0, 1, 511, 4096, 64 * 1024, 5 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_the_size_is_the_one_asked_for(size: int) -> None:
    buf = nbd.Buffer(size)
    assert (len(buf), buf.size()) == (size, size)


@pytest.mark.parametrize("size", SIZES)
def test_what_was_never_written_reads_as_zeroes(size: int) -> None:
    assert nbd.Buffer(size).to_bytearray() == bytes(size)
    assert bytes(nbd.Buffer(size)) == bytes(size)
    assert bytes(nbd.Buffer(size).to_buffer()) == bytes(size)
    assert nbd.Buffer(size).is_zero()
    assert not any(nbd.Buffer(size)[:])


@pytest.mark.parametrize("size", [-1, (1 << 63) - 1, 1 << 64])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises((ValueError, OverflowError, MemoryError)):
        nbd.Buffer(size)


@pytest.mark.parametrize("size", ["1", 1.0, None, b"x"])
def test_a_size_that_is_not_an_int_is_a_type_error(size: Any) -> None:
    with pytest.raises(TypeError):
        nbd.Buffer(size)


def test_an_old_buffer_never_shows_through() -> None:
    for size in (4096, 1 << 20):
        for _ in range(5):
            old = nbd.Buffer(size)
            old[:] = b"\xa5" * size
            del old
            gc.collect()
            assert nbd.Buffer(size).is_zero()


@pytest.mark.parametrize("initialize", [True, False])
def test_a_failed_read_does_not_show_old_bytes(
    nbdkit: StartServer, h: nbd.NBD, initialize: bool
) -> None:
    server = nbdkit("memory", "8M", "--filter=error", "error-pread=EIO", "error-pread-rate=1")
    h.set_pread_initialize(initialize)
    h.connect_unix(server.socket)
    size = 1 << 20
    old = nbd.Buffer(size)
    old[:] = b"\xa5" * size
    del old
    gc.collect()
    buf = nbd.Buffer(size)
    cookie = h.aio_pread(buf, 0)
    with pytest.raises(nbd.Error):
        finish(h, cookie)
    assert buf.is_zero()


def test_a_read_that_was_refused_leaves_the_buffer_zero(disk: nbd.NBD) -> None:
    buf = nbd.Buffer(1 << 20)
    with pytest.raises(nbd.Error):
        disk.aio_pread(buf, 1 << 40)
    assert buf.is_zero()


def test_from_bytearray_copies() -> None:
    data = bytearray(b"abc")
    buf = nbd.Buffer.from_bytearray(data)
    data[0] = 0
    assert buf.to_bytearray() == b"abc"


def test_from_bytearray_leaves_its_argument_free() -> None:
    data = bytearray(b"abc")
    buf = nbd.Buffer.from_bytearray(data)
    data.extend(b"def")
    assert (len(data), len(buf)) == (6, 3)


@pytest.mark.parametrize(
    "data", [b"abc", memoryview(b"abc"), array.array("B", b"abc"), [97, 98, 99]]
)
def test_from_bytearray_takes_what_bytearray_takes(data: Any) -> None:
    assert nbd.Buffer.from_bytearray(data).to_bytearray() == b"abc"


@pytest.mark.parametrize("data", ["abc", None, 1.5])
def test_from_bytearray_refuses_everything_else(data: Any) -> None:
    with pytest.raises(TypeError):
        nbd.Buffer.from_bytearray(data)


def test_from_buffer_shares() -> None:
    data = bytearray(b"abc")
    buf = nbd.Buffer.from_buffer(data)
    data[0] = ord("x")
    buf[1] = ord("y")
    assert data == buf.to_bytearray() == b"xyc"


def test_from_buffer_has_the_size_that_its_argument_has_now(disk: nbd.NBD) -> None:
    data = bytearray(b"x" * 512)
    buf = nbd.Buffer.from_buffer(data)
    data.extend(b"y" * 512)
    assert (len(buf), buf.size(), buf.is_zero()) == (1024, 1024, False)
    finish(disk, disk.aio_pwrite(buf, 0))
    assert disk.pread(1024, 0) == data
    data[:] = bytes(4096)
    finish(disk, disk.aio_pread(buf, 0))
    assert data == b"x" * 512 + b"y" * 512 + bytes(3072)
    data.clear()
    assert (len(buf), buf.is_zero()) == (0, True)


def test_from_buffer_leaves_a_mapping_to_be_closed() -> None:
    with mmap.mmap(-1, 4096) as memory:
        buf = nbd.Buffer.from_buffer(memory)
    assert memory.closed
    assert buf.to_buffer() is memory


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy: to_buffer is a memoryview")
def test_what_to_buffer_gives_can_be_resized(disk: nbd.NBD) -> None:
    buf = nbd.Buffer(512)
    buf.to_buffer().append(1)
    assert (len(buf), buf.is_zero(), buf.is_zero(0, 512)) == (513, False, True)
    finish(disk, disk.aio_pread(buf, 0))
    assert buf.to_bytearray() == bytes(513)


def test_from_buffer_shares_a_mapping() -> None:
    memory = mmap.mmap(-1, 4096)
    buf = nbd.Buffer.from_buffer(memory)
    buf[0:3] = b"abc"
    assert memory[:3] == b"abc"


def test_from_buffer_of_part_of_a_memoryview() -> None:
    data = bytearray(8)
    buf = nbd.Buffer.from_buffer(memoryview(data)[2:6])
    buf[:] = b"abcd"
    assert data == b"\0\0abcd\0\0"


@pytest.mark.parametrize("data", ["abc", None, 3, [1, 2]])
def test_from_buffer_refuses_objects_without_the_buffer_protocol(data: Any) -> None:
    with pytest.raises(TypeError):
        nbd.Buffer.from_buffer(data)


def test_from_buffer_of_bytes_cannot_be_written() -> None:
    buf = nbd.Buffer.from_buffer(b"abc")
    assert bytes(buf) == b"abc"
    with pytest.raises(TypeError):
        buf[0] = 1


def test_from_buffer_of_bytes_cannot_be_read_into(disk: nbd.NBD) -> None:
    with pytest.raises((BufferError, TypeError, ValueError)):
        disk.aio_pread(nbd.Buffer.from_buffer(bytes(512)), 0)
    assert disk.aio_in_flight() == 0


def test_from_buffer_of_bytes_can_be_written_to_the_disk(disk: nbd.NBD) -> None:
    finish(disk, disk.aio_pwrite(nbd.Buffer.from_buffer(b"abc"), 0))
    assert disk.pread(3, 0) == b"abc"


def test_from_buffer_keeps_what_it_shares() -> None:
    buf = nbd.Buffer.from_buffer(bytearray(b"x" * 4096))
    gc.collect()
    assert bytes(buf) == b"x" * 4096


def test_to_buffer_shares() -> None:
    buf = nbd.Buffer(4)
    memoryview(buf.to_buffer())[:] = b"abcd"
    assert buf.to_bytearray() == b"abcd"


def test_to_buffer_sees_a_later_read(disk: nbd.NBD) -> None:
    disk.pwrite(b"later", 0)
    buf = nbd.Buffer(5)
    view = buf.to_buffer()
    finish(disk, disk.aio_pread(buf, 0))
    assert bytes(view) == b"later"


def test_to_buffer_gives_what_from_buffer_was_given() -> None:
    data = bytearray(b"abc")
    assert nbd.Buffer.from_buffer(data).to_buffer() is data


def test_a_copy_shares_the_memory() -> None:
    buf = nbd.Buffer(8)
    again = copy.copy(buf)
    again[0] = 1
    assert buf[0] == 1


def test_the_memory_of_copies_is_not_given_to_two_others() -> None:
    copies = [copy.copy(buf) for buf in [nbd.Buffer(4096)]]
    del copies
    first, second = nbd.Buffer(4096), nbd.Buffer(4096)
    second[0] = 1
    assert bytes(first) == bytes(4096)
    first[0] = 2
    assert second[0] == 1


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda buf: pickle.loads(pickle.dumps(buf))], ids=["copy", "pickle"]
)
def test_a_deep_copy_has_memory_of_its_own(twin: Callable[[nbd.Buffer], nbd.Buffer]) -> None:
    buf = nbd.Buffer.from_bytearray(b"abc")
    again = twin(buf)
    buf[0] = 0
    assert bytes(again) == b"abc"


def test_a_buffer_takes_attributes() -> None:
    buf: Any = nbd.Buffer(8)
    buf.offset = 512
    assert copy.deepcopy(buf).offset == 512


def test_to_bytearray_copies() -> None:
    buf = nbd.Buffer(4)
    copy = buf.to_bytearray()
    copy[:] = b"abcd"
    assert type(copy) is bytearray
    assert buf.to_bytearray() == bytes(4)


def test_bytes_of_a_buffer() -> None:
    assert bytes(nbd.Buffer.from_bytearray(b"abc")) == b"abc"


def test_an_index_reads_and_writes() -> None:
    buf = nbd.Buffer(3)
    buf[0], buf[-1] = 1, 255
    assert (buf[0], buf[1], buf[2], buf[-3]) == (1, 0, 255, 1)


@pytest.mark.parametrize("where", [3, -4, 1 << 40])
def test_an_index_out_of_range_is_index_error(where: int) -> None:
    buf = nbd.Buffer(3)
    with pytest.raises(IndexError):
        buf[where]
    with pytest.raises(IndexError):
        buf[where] = 0


@pytest.mark.parametrize("value", [-1, 256])
def test_a_byte_out_of_range_is_value_error(value: int) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        nbd.Buffer(3)[0] = value


def test_a_slice_reads_and_writes() -> None:
    buf = nbd.Buffer(8)
    buf[2:5] = b"abc"
    assert bytes(buf[1:6]) == b"\0abc\0"
    assert bytes(buf[:]) == b"\0\0abc\0\0\0"
    assert bytes(buf[-5:-3]) == b"bc"


@pytest.mark.parametrize(
    "value",
    [[1, 2], (1, 2), range(1, 3), nbd.Buffer.from_bytearray(b"\1\2"), array.array("H", b"\1\2")],
    ids=["list", "tuple", "range", "Buffer", "array of uint16"],
)
def test_a_slice_can_be_set_to_what_a_bytearray_takes(value: Any) -> None:
    buf = nbd.Buffer.from_bytearray(b"abcd")
    buf[1:3] = value
    assert bytes(buf) == b"a\1\2d"


@pytest.mark.parametrize("value", ["xy", 2, None, [1.5, 2]])
def test_a_slice_can_be_set_to_nothing_else(value: Any) -> None:
    buf = nbd.Buffer.from_bytearray(b"abcd")
    with pytest.raises(TypeError):
        buf[1:3] = value
    assert bytes(buf) == b"abcd"


def test_a_slice_with_a_step_reads() -> None:
    assert bytes(nbd.Buffer.from_bytearray(b"abcdef")[::2]) == b"ace"


@pytest.mark.parametrize("data", [b"ab", b"abcd"])
def test_a_slice_cannot_change_the_size(data: bytes) -> None:
    buf = nbd.Buffer(8)
    with pytest.raises((ValueError, BufferError)):
        buf[2:5] = data
    assert (len(buf), buf.is_zero()) == (8, True)


def test_a_buffer_iterates_over_its_bytes() -> None:
    assert list(nbd.Buffer.from_bytearray(b"abc")) == [97, 98, 99]


def test_a_buffer_that_was_never_written_iterates_over_zeroes() -> None:
    assert list(nbd.Buffer(3)) == [0, 0, 0]


def test_an_empty_buffer_is_false_and_another_true() -> None:
    assert not nbd.Buffer(0)
    assert nbd.Buffer(1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), False),
        ((0,), False),
        ((0, -1), False),
        ((0, 4), True),
        ((0, 5), False),
        ((4,), False),
        ((5,), True),
        ((5, 3), True),
        ((4, 0), True),
        ((8,), True),
        ((8, 0), True),
        ((9, 0), True),
    ],
)
def test_is_zero_looks_at_the_range_it_is_given(arguments: Any, expected: bool) -> None:
    buf = nbd.Buffer(8)
    buf[4] = 1
    assert buf.is_zero(*arguments) is expected


def test_is_zero_takes_names() -> None:
    assert nbd.Buffer(8).is_zero(offset=2, size=3) is True


@pytest.mark.parametrize(
    "arguments", [(9,), (-1,), (0, 9), (4, 5), (8, 1), (0, -2), (1 << 62, 1 << 62)]
)
def test_is_zero_out_of_range_is_index_error(arguments: Any) -> None:
    with pytest.raises(IndexError):
        nbd.Buffer(8).is_zero(*arguments)


def test_is_zero_finds_a_single_byte_anywhere() -> None:
    size = 70_000
    for where in (0, 1, 15, 16, 17, 4095, 65_535, size - 1):
        buf = nbd.Buffer(size)
        buf[where] = 1
        assert not buf.is_zero()
        assert buf.is_zero(0, where)
        assert buf.is_zero(where + 1)


def test_a_buffer_can_be_used_again(disk: nbd.NBD) -> None:
    disk.pwrite(b"first", 0)
    disk.pwrite(b"other", 512)
    buf = nbd.Buffer(5)
    found = []
    for offset in (0, 512, 1024):
        finish(disk, disk.aio_pread(buf, offset))
        found.append(bytes(buf))
    assert found == [b"first", b"other", bytes(5)]


def test_a_buffer_reads_over_what_was_written_into_it(disk: nbd.NBD) -> None:
    buf = nbd.Buffer(512)
    buf[:] = b"x" * 512
    finish(disk, disk.aio_pread(buf, 0))
    assert buf.is_zero()


def test_one_buffer_in_two_commands(disk: nbd.NBD) -> None:
    buf = nbd.Buffer.from_bytearray(b"twice")
    cookies = [disk.aio_pwrite(buf, offset) for offset in (0, 512)]
    for cookie in cookies:
        finish(disk, cookie)
    assert disk.pread(5, 0) == disk.pread(5, 512) == b"twice"


def test_writing_a_buffer_that_was_never_written_writes_zeroes(disk: nbd.NBD) -> None:
    disk.pwrite(b"x" * 200_000, 0)
    finish(disk, disk.aio_pwrite(nbd.Buffer(200_000), 0))
    assert disk.pread(200_000, 0) == bytes(200_000)


def test_a_buffer_copies_between_two_handles(disk: nbd.NBD, nbdkit: StartServer) -> None:
    with nbd.NBD() as target:
        target.connect_unix(nbdkit("memory", "1M").socket)
        disk.pwrite(b"moved", 0)
        buf = nbd.Buffer(1 << 20)
        finish(disk, disk.aio_pread(buf, 0))
        finish(target, target.aio_pwrite(buf, 0))
        assert target.pread(5, 0) == b"moved"


# ---- calls of the special methods by hand


def in_flight(disk: nbd.NBD, size: int) -> tuple[nbd.Buffer, int]:
    """Return a Buffer into which a command is reading bytes of x, and the command's cookie."""
    disk.pwrite(b"x" * size, 0)
    buf = nbd.Buffer(size)
    return buf, disk.aio_pread(buf, 0)


def others_of(size: int) -> list[nbd.Buffer]:
    """Return Buffers full of y that take up whatever memory is free."""
    others = [nbd.Buffer(size) for _ in range(8)]
    for other in others:
        other[:] = b"y" * size
    return others


@pytest.mark.parametrize("size", [512, 300_000])
@pytest.mark.parametrize("times", [1, 2])
def test_a_finalizer_called_by_hand_gives_no_memory_away(
    disk: nbd.NBD, size: int, times: int
) -> None:
    buf, cookie = in_flight(disk, size)
    for _ in range(times):
        getattr(buf, "__del__", lambda: None)()
    others = others_of(size)
    finish(disk, cookie)
    assert all(bytes(other) == b"y" * size for other in others)


@pytest.mark.parametrize("size", [512, 300_000])
@pytest.mark.parametrize("again", [300_000, 512, 0])
def test_a_second_init_while_a_command_is_in_flight_gives_no_memory_away(
    disk: nbd.NBD, size: int, again: int
) -> None:
    buf, cookie = in_flight(disk, size)
    buf.__init__(again)  # type: ignore[misc]
    others = others_of(size)
    finish(disk, cookie)
    assert all(bytes(other) == b"y" * size for other in others)
    assert bytes(buf) == bytes(again)


@pytest.mark.parametrize("wrong", [-1, "512", 1 << 62])
def test_a_second_init_that_fails_leaves_the_buffer(disk: nbd.NBD, wrong: Any) -> None:
    buf, cookie = in_flight(disk, 512)
    with pytest.raises((ValueError, TypeError, MemoryError)):
        buf.__init__(wrong)  # type: ignore[misc]
    finish(disk, cookie)
    assert bytes(buf) == b"x" * 512


class Uninitialised(nbd.Buffer):
    """A Buffer without memory."""

    def __init__(self) -> None:
        """Do not call super().__init__()."""


@pytest.mark.parametrize(
    "use",
    [
        len,
        bytes,
        list,
        copy.copy,
        pickle.dumps,
        lambda buf: buf[0],
        lambda buf: buf[:],
        lambda buf: buf.size(),
        lambda buf: buf.is_zero(),
        lambda buf: buf.to_buffer(),
        lambda buf: buf.to_bytearray(),
    ],
    ids=["len", "bytes", "list", "copy", "pickle", "index", "slice", *METHODS],
)
@pytest.mark.parametrize("make", [Uninitialised, lambda: nbd.Buffer.__new__(nbd.Buffer)])
def test_a_buffer_whose_init_was_not_called_raises_an_error_that_says_so(
    make: Callable[[], nbd.Buffer], use: Callable[[nbd.Buffer], object]
) -> None:
    with pytest.raises(AttributeError, match="__init__"):
        use(make())


@pytest.mark.parametrize("call", ["pwrite", "aio_pread", "aio_pwrite"])
def test_a_call_with_a_buffer_whose_init_was_not_called_says_so(disk: nbd.NBD, call: str) -> None:
    with pytest.raises(AttributeError, match="__init__"):
        getattr(disk, call)(Uninitialised(), 0)
    assert disk.aio_in_flight() == 0
    assert disk.pread(1, 0) == b"\0"


def test_a_buffer_whose_init_was_not_called_can_be_shown() -> None:
    assert "Buffer" in repr(nbd.Buffer.__new__(nbd.Buffer))
