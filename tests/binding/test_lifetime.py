"""Callables and buffers live as long as libnbd needs them, and no longer."""

from __future__ import annotations

import array
import gc
import mmap
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Callable

import pytest
from support.handles import closed, drain, drain_dying, finish
from support.servers import StartServer
from support.sizes import MIB
from support.usage import Bytes, registered

import nbd

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")

refuses_to_resize = pytest.mark.skipif(
    sys.implementation.name == "pypy",
    reason="PyPy 7 resizes an object whose memory is exported; there libnbd works on a copy",
)


class Completion:
    """A callable that supports weak references."""

    def __init__(self, result: int = 1) -> None:
        self.result = result

    def __call__(self, *arguments: Any) -> int:
        return self.result


def alive(reference: weakref.ref[Any]) -> bool:
    """Return whether the referent of a weak reference survives a collection."""
    gc.collect()
    return reference() is not None


def gone(reference: weakref.ref[Any]) -> bool:
    """Return whether the referent was freed; PyPy may need several collections."""
    for _ in range(5):
        if reference() is None:
            return True
        gc.collect()
    return reference() is None


@pytest.fixture
def stuck(nbdkit: StartServer, h: nbd.NBD) -> Iterator[nbd.NBD]:
    """Return a handle whose reads and writes are never answered."""
    options = ["--filter=delay", "rdelay=600", "wdelay=600"]
    h.connect_unix(nbdkit("memory", "1M", *options).socket)
    yield h
    if not closed(h):
        h.close()


def test_a_callable_lives_while_its_command_is_in_flight(stuck: nbd.NBD) -> None:
    completion = Completion()
    reference = weakref.ref(completion)
    stuck.aio_pread(nbd.Buffer(512), 0, completion)
    del completion
    assert alive(reference)
    assert registered() > 0


def test_a_callable_is_released_when_its_command_is_retired(disk: nbd.NBD) -> None:
    completion = Completion()
    reference = weakref.ref(completion)
    disk.aio_pread(nbd.Buffer(512), 0, completion)
    del completion
    drain(disk)
    assert gone(reference)
    assert registered() == 0


def test_a_callable_that_did_not_retire_its_command_is_released_with_it(disk: nbd.NBD) -> None:
    completion = Completion(result=0)
    reference = weakref.ref(completion)
    cookie = disk.aio_pread(nbd.Buffer(512), 0, completion)
    del completion
    finish(disk, cookie)
    assert gone(reference)
    assert registered() == 0


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda h, call: h.block_status(MIB, 0, call), id="block_status"),
        pytest.param(lambda h, call: h.pread_structured(512, 0, call), id="pread_structured"),
        pytest.param(
            lambda h, call: h.aio_pread_structured(bytearray(512), 0, call, call),
            id="aio_pread_structured",
        ),
        pytest.param(
            lambda h, call: h.aio_block_status(MIB, 0, Completion(0), call), id="aio_block_status"
        ),
    ],
)
def test_a_callable_is_released_after_its_call(
    disk: nbd.NBD, call: Callable[[nbd.NBD, Any], object]
) -> None:
    callback = Completion()
    reference = weakref.ref(callback)
    call(disk, callback)
    del callback
    drain(disk)
    assert gone(reference)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda h, call: h.aio_pread(bytearray(512), MIB, call), id="aio_pread"),
        pytest.param(lambda h, call: h.aio_pwrite(bytes(512), MIB, call), id="aio_pwrite"),
        pytest.param(lambda h, call: h.aio_flush(call, 1 << 15), id="aio_flush"),
        pytest.param(lambda h, call: h.pread_structured(512, MIB, call), id="pread_structured"),
        pytest.param(lambda h, call: h.block_status(512, MIB, call), id="block_status"),
        pytest.param(lambda h, call: h.opt_list(call), id="opt_list"),
        pytest.param(lambda h, call: h.aio_opt_info(call), id="aio_opt_info"),
    ],
)
def test_a_callable_is_released_if_the_call_is_refused(
    disk: nbd.NBD, call: Callable[[nbd.NBD, Any], object]
) -> None:
    callback = Completion()
    reference = weakref.ref(callback)
    with pytest.raises(nbd.Error):
        call(disk, callback)
    del callback
    assert gone(reference)
    assert registered() == 0


def test_a_callable_is_released_if_a_later_argument_is_wrong(disk: nbd.NBD) -> None:
    callback = Completion()
    reference = weakref.ref(callback)
    wrong: Any = "no flags"
    with pytest.raises(TypeError):
        disk.aio_pread_structured(bytearray(512), 0, callback, callback, wrong)
    with pytest.raises(TypeError):
        disk.aio_pread_structured(bytearray(512), 0, callback, wrong)
    with pytest.raises((OverflowError, ValueError)):
        disk.aio_pread_structured(bytearray(512), -1, callback, callback)
    del callback
    assert gone(reference)
    assert registered() == 0


def test_callables_are_released_when_the_handle_is_closed(stuck: nbd.NBD) -> None:
    completion = Completion()
    reference = weakref.ref(completion)
    for _ in range(8):
        stuck.aio_pread(nbd.Buffer(512), 0, completion)
    stuck.close()
    del completion
    assert gone(reference)
    assert registered() == 0


def test_callables_are_released_when_the_handle_is_dropped(nbdkit: StartServer) -> None:
    handle = nbd.NBD()
    handle.connect_unix(nbdkit("memory", "1M", "--filter=delay", "rdelay=600").socket)
    completion = Completion()
    reference = weakref.ref(completion)
    handle.aio_pread(nbd.Buffer(512), 0, completion)
    del handle, completion
    assert gone(reference)
    assert registered() == 0


def test_callables_are_released_when_the_server_died(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M", "--filter=delay", "rdelay=600")
    h.connect_unix(server.socket)
    completion = Completion()
    reference = weakref.ref(completion)
    h.aio_pread(nbd.Buffer(512), 0, completion)
    server.kill()
    drain_dying(h)
    del completion
    assert gone(reference)
    assert registered() == 0


def test_a_debug_callback_lives_until_it_is_replaced(h: nbd.NBD) -> None:
    first, second = Completion(), Completion()
    references = [weakref.ref(first), weakref.ref(second)]
    h.set_debug_callback(first)
    del first
    assert alive(references[0])
    h.set_debug_callback(second)
    del second
    assert gone(references[0])
    assert alive(references[1])
    h.clear_debug_callback()
    assert gone(references[1])


def test_a_debug_callback_is_released_when_the_handle_is_closed(h: nbd.NBD) -> None:
    callback = Completion()
    reference = weakref.ref(callback)
    h.set_debug_callback(callback)
    del callback
    h.close()
    assert gone(reference)


def test_an_exception_of_a_callback_is_released_with_the_error(disk: nbd.NBD) -> None:
    class Mine(Exception):
        pass

    references = []

    def chunk(*arguments: Any) -> None:
        raised = Mine()
        references.append(weakref.ref(raised))
        raise raised

    with pytest.raises(nbd.Error) as caught:
        disk.pread_structured(512, 0, chunk)
    del caught
    assert gone(references[0])


def test_a_buffer_lives_while_its_command_is_in_flight(stuck: nbd.NBD) -> None:
    buffer = Bytes(512)
    reference = weakref.ref(buffer)
    stuck.aio_pread(buffer, 0)
    del buffer
    assert alive(reference)


def test_a_buffer_is_released_when_its_command_is_retired(disk: nbd.NBD) -> None:
    buffer = Bytes(512)
    reference = weakref.ref(buffer)
    finish(disk, disk.aio_pread(buffer, 0))
    del buffer
    assert gone(reference)


def test_a_buffer_is_released_when_a_completion_retired_its_command(disk: nbd.NBD) -> None:
    buffer = Bytes(512)
    reference = weakref.ref(buffer)
    disk.aio_pread(buffer, 0, lambda error: 1)
    del buffer
    drain(disk)
    assert gone(reference)


@refuses_to_resize
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda h, buf: h.aio_pread(buf, 0), id="aio_pread"),
        pytest.param(lambda h, buf: h.aio_pread(buf, 0, lambda error: 0), id="with completion"),
        pytest.param(
            lambda h, buf: h.aio_pread_structured(buf, 0, lambda *chunk: 0), id="structured"
        ),
        pytest.param(lambda h, buf: h.aio_pwrite(buf, 0), id="aio_pwrite"),
    ],
)
def test_a_bytearray_in_flight_cannot_be_resized(
    stuck: nbd.NBD, command: Callable[[nbd.NBD, Any], int]
) -> None:
    buf = bytearray(512)
    command(stuck, buf)
    with pytest.raises(BufferError):
        buf.append(0)
    with pytest.raises(BufferError):
        buf.clear()
    with pytest.raises(BufferError):
        del buf[0]
    assert len(buf) == 512


@refuses_to_resize
def test_an_array_in_flight_cannot_be_resized(stuck: nbd.NBD) -> None:
    buf = array.array("B", bytes(512))
    stuck.aio_pread(buf, 0)
    with pytest.raises(BufferError):
        buf.append(0)


@refuses_to_resize
def test_a_mapping_in_flight_cannot_be_closed(stuck: nbd.NBD) -> None:
    buf = mmap.mmap(-1, 4096)
    stuck.aio_pread(buf, 0)
    with pytest.raises(BufferError):
        buf.close()


@refuses_to_resize
def test_a_memoryview_in_flight_keeps_what_it_shows(stuck: nbd.NBD) -> None:
    data = bytearray(512)
    with memoryview(data) as view:
        stuck.aio_pread(view, 0)
    with pytest.raises(BufferError):
        data.append(0)


@refuses_to_resize
def test_a_shared_bytearray_in_flight_cannot_be_resized(stuck: nbd.NBD) -> None:
    data = bytearray(512)
    stuck.aio_pread(nbd.Buffer.from_buffer(data), 0)
    with pytest.raises(BufferError):
        data.append(0)


@pytest.mark.parametrize("shared", [False, True], ids=["bytearray", "shared"])
def test_a_resize_in_flight_is_harmless(
    nbdkit: StartServer, h: nbd.NBD, unraisable: list[Any], shared: bool
) -> None:
    # CPython and PyPy 8 refuse to resize it, whereas PyPy 7 resizes it.  Then libnbd must not write
    # to the old memory, and the data is lost.
    server = nbdkit("memory", "1M", "--filter=delay", "rdelay=600")
    h.connect_unix(server.socket)
    buffers = [bytearray(4096) for _ in range(32)]
    for buf in buffers:
        h.aio_pread(nbd.Buffer.from_buffer(buf) if shared else buf, 0, lambda error: 1)
    for buf in buffers:
        with suppress(BufferError):
            buf.extend(bytes(1 << 16))
    server.kill()
    drain_dying(h)
    h.close()
    gc.collect()
    assert all(buf.count(0) == len(buf) for buf in buffers)
    assert {type(exception) for exception in unraisable} <= {BufferError}


def test_a_bytearray_can_be_resized_once_its_command_is_retired(disk: nbd.NBD) -> None:
    buf = bytearray(512)
    finish(disk, disk.aio_pread(buf, 0))
    buf.append(1)
    assert len(buf) == 513


def test_a_bytearray_can_be_resized_once_a_completion_retired_its_command(disk: nbd.NBD) -> None:
    buf = bytearray(512)
    disk.aio_pread(buf, 0, lambda error: 1)
    drain(disk)
    gc.collect()
    buf.append(1)
    assert len(buf) == 513


def test_a_bytearray_can_be_resized_after_a_call_that_waited(disk: nbd.NBD) -> None:
    buf = bytearray(b"x" * 512)
    disk.pwrite(buf, 0)
    buf.append(1)
    got = disk.pread(512, 0)
    got.append(1)
    assert (len(buf), len(got)) == (513, 513)


def test_a_bytearray_can_be_resized_if_its_command_was_refused(disk: nbd.NBD) -> None:
    buf = bytearray(512)
    with pytest.raises(nbd.Error):
        disk.aio_pread(buf, MIB)
    gc.collect()
    buf.append(1)
    assert len(buf) == 513


def test_what_a_write_in_flight_sends_is_kept(disk: nbd.NBD) -> None:
    for offset in range(0, MIB, 4096):
        disk.aio_pwrite(bytearray(b"q" * 4096), offset, lambda error: 1)
    gc.collect()
    drain(disk)
    assert disk.pread(MIB, 0) == b"q" * MIB


def test_a_stashed_view_outlives_the_call(disk: nbd.NBD) -> None:
    disk.pwrite(b"kept" * 128, 0)
    views: list[memoryview] = []
    disk.pread_structured(512, 0, lambda view, *rest: views.append(view))
    gc.collect()
    assert bytes(views[0]) == b"kept" * 128


def test_a_stashed_view_keeps_its_buffer_alive(disk: nbd.NBD) -> None:
    disk.pwrite(b"kept" * 128, 0)
    views: list[memoryview] = []
    finish(
        disk,
        disk.aio_pread_structured(
            nbd.Buffer(512), 0, lambda view, *rest: views.append(view), lambda error: 0
        ),
    )
    others = [nbd.Buffer.from_bytearray(b"x" * 512) for _ in range(64)]
    gc.collect()
    assert bytes(views[0]) == b"kept" * 128
    assert len(others) == 64


@refuses_to_resize
def test_a_stashed_view_makes_its_buffer_unresizable(disk: nbd.NBD) -> None:
    views: list[memoryview] = []
    got = disk.pread_structured(512, 0, lambda view, *rest: views.append(view))
    with pytest.raises(BufferError):
        got.append(0)
    views.pop().release()
    got.append(0)
    assert len(got) == 513


@refuses_to_resize
def test_a_stashed_view_of_aio_makes_its_buffer_unresizable(disk: nbd.NBD) -> None:
    views: list[memoryview] = []
    buf = bytearray(512)
    finish(disk, disk.aio_pread_structured(buf, 0, lambda view, *rest: views.append(view)))
    with pytest.raises(BufferError):
        buf.append(0)
    views.pop().release()
    buf.append(0)
    assert len(buf) == 513


def test_a_stashed_view_sees_later_writes(disk: nbd.NBD) -> None:
    views: list[memoryview] = []
    got = disk.pread_structured(512, 0, lambda view, *rest: views.append(view))
    got[:4] = b"late"
    assert bytes(views[0][:4]) == b"late"


def test_a_stashed_view_cannot_be_written(disk: nbd.NBD) -> None:
    views: list[memoryview] = []
    disk.pread_structured(512, 0, lambda view, *rest: views.append(view))
    with pytest.raises(TypeError):
        views[0][0] = 1
    with pytest.raises(TypeError):
        memoryview(views[0])[0] = 1


def test_a_stashed_view_of_a_slice_shows_its_part(disk: nbd.NBD) -> None:
    disk.pwrite(b"part" * 64, 0)
    views: list[memoryview] = []
    buf = bytearray(1024)
    finish(
        disk,
        disk.aio_pread_structured(
            memoryview(buf)[256:512], 0, lambda view, *rest: views.append(view)
        ),
    )
    assert bytes(views[0]) == b"part" * 64 == bytes(buf[256:512])


def test_many_rounds_leave_nothing(disk: nbd.NBD) -> None:
    before = registered()
    for _ in range(300):
        disk.aio_pread(nbd.Buffer(512), 0, lambda error: 1)
        disk.aio_pread_structured(bytearray(512), 0, lambda *chunk: 0, lambda error: 1)
        disk.aio_block_status(MIB, 0, lambda *extent: 0, lambda error: 1)
        drain(disk)
    assert registered() == before == 0
