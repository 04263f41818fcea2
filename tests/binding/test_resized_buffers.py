"""Buffers that are resized while in use never show, or let libnbd write to, foreign memory."""

from __future__ import annotations

import sys
from typing import Any, Callable

import pytest
from support.programs import output_of
from support.servers import StartServer

import nbd
from nbd._binding.shim import IS_FREE_THREADED

# Without the GIL, CPython 3.13 counts wrongly what uses a bytearray in two threads at a time.
pytestmark = pytest.mark.skipif(
    IS_FREE_THREADED and sys.version_info < (3, 14),
    reason="bytearrays of CPython 3.13 without the GIL are not safe to share",
)

SIZE = 1 << 20

# Another thread keeps trying to resize `shared`.
RESIZING = """
import sys, threading, time, nbd

SIZE = 1 << 20
shared = bytearray(SIZE)
buffer = nbd.Buffer.from_buffer(shared)
stop = False

def resize():
    while not stop:
        for size in (0, 1, SIZE // 2, SIZE, 2 * SIZE):
            try:
                if size < len(shared):
                    del shared[size:]
                else:
                    shared.extend(bytes(size - len(shared)))
            except BufferError:  # in use
                pass
        time.sleep(0)  # lets other threads run, which PyPy would do only after many bytecodes

def notice(unraisable):  # on PyPy: the bytearray was resized, and the data of the command is lost
    if not isinstance(unraisable.exc_value, BufferError):
        sys.__unraisablehook__(unraisable)

sys.unraisablehook = notice

def until_resized(use):
    '''Use it for a while; a size that it no longer has may be refused.'''
    thread = threading.Thread(target=resize)
    thread.start()
    end, times = time.monotonic() + 0.2, 0
    try:
        while time.monotonic() < end:
            try:
                use()
            except (BufferError, IndexError, ValueError, nbd.Error):
                pass
            times += 1
    finally:
        globals().update(stop=True)
        thread.join()
    print(times)
"""

CONNECTED = """
h = nbd.NBD()
h.connect_unix(sys.argv[1])

def finish(cookie):
    while not h.aio_command_completed(cookie):
        h.poll(-1)
"""

LOOKS = {
    "is_zero": "assert buffer.is_zero()",
    "is_zero of a part": "assert buffer.is_zero(SIZE // 4, SIZE // 4)",
    "item": "assert buffer[SIZE - 1] == 0",
    "slice": "assert not any(buffer[SIZE - 512:])",
    "set": "buffer[SIZE - 1] = 0",
    "set a slice": "buffer[SIZE - 512:SIZE] = bytes(512)",
    "bytes": "assert len(bytes(buffer)) in (0, 1, SIZE // 2, SIZE, 2 * SIZE)",
    "to_bytearray": "assert len(buffer.to_bytearray()) in (0, 1, SIZE // 2, SIZE, 2 * SIZE)",
    "size": "assert buffer.size() in (0, 1, SIZE // 2, SIZE, 2 * SIZE)",
}

COMMANDS = {
    "pwrite": "h.pwrite(shared, 0)",
    "pwrite of a Buffer": "h.pwrite(buffer, 0)",
    "aio_pwrite": "finish(h.aio_pwrite(buffer, 0))",
    "aio_pread": "finish(h.aio_pread(shared, 0))",
    "aio_pread into a Buffer": "finish(h.aio_pread(buffer, 0))",
    "aio_pread_structured": "finish(h.aio_pread_structured(shared, 0, lambda *chunk: 0))",
}


def resized(use: str, *arguments: str) -> None:
    """Run a program that uses `shared`, and an nbd.Buffer of it, while it is resized."""
    connected = CONNECTED if arguments else ""
    program = f"{RESIZING}\n{connected}\ndef use():\n    {use}\n\nuntil_resized(use)"
    printed = output_of(program, *arguments)
    assert int(printed) > 0


@pytest.mark.parametrize("use", LOOKS.values(), ids=LOOKS)
def test_looking_at_shared_memory_that_another_thread_resizes(use: str) -> None:
    resized(use)


@pytest.mark.parametrize("use", COMMANDS.values(), ids=COMMANDS)
def test_a_command_on_memory_that_another_thread_resizes(nbdkit: StartServer, use: str) -> None:
    resized(use, nbdkit("memory", "64M").socket)


class Emptying:
    """A number whose conversion empties a bytearray."""

    def __init__(self, value: int, shared: bytearray) -> None:
        self.value = value
        self.shared = shared

    def __index__(self) -> int:
        del self.shared[:]
        return self.value


KEYS: dict[str, Callable[[nbd.Buffer, Any], object]] = {
    "is_zero": lambda buffer, number: buffer.is_zero(number),
    "is_zero, size": lambda buffer, number: buffer.is_zero(0, number),
    "item": lambda buffer, number: buffer[number],
    "set": lambda buffer, number: buffer.__setitem__(number, 0),
    "set to": lambda buffer, number: buffer.__setitem__(SIZE - 1, number),
}


@pytest.mark.parametrize("look", KEYS.values(), ids=KEYS)
def test_a_number_that_empties_the_buffer_is_outside(look: Callable[..., object]) -> None:
    shared = bytearray(SIZE)
    buffer = nbd.Buffer.from_buffer(shared)
    with pytest.raises((IndexError, ValueError)):
        look(buffer, Emptying(SIZE - 1, shared))
    assert len(buffer) == 0


def test_a_number_that_empties_the_buffer_leaves_an_empty_slice() -> None:
    shared = bytearray(SIZE)
    buffer = nbd.Buffer.from_buffer(shared)
    assert buffer[Emptying(512, shared) : SIZE] == b""


# The callback of a chunk resizes the object that underlies its view.
CHUNKS = """
import sys, nbd

SIZE = 1 << 20
h = nbd.NBD()
h.connect_unix(sys.argv[1])
data = bytes(range(256)) * (SIZE // 256)
h.pwrite(data, 0)
refused = 0

def resize(view):
    global refused
    for change in (lambda o: o.extend(bytes(SIZE)), lambda o: o.clear(), lambda o: o.append(0)):
        try:
            change(view.obj)
        except (BufferError, AttributeError, TypeError):
            refused += 1

def chunk(subbuf, offset, status, error):
    resize(subbuf)
    resize(subbuf[:1])
    return 0

def finish(cookie):
    while not h.aio_command_completed(cookie):
        h.poll(-1)

for _ in range(20):
    assert h.pread_structured(SIZE, 0, chunk) == data
    buffer = nbd.Buffer(SIZE)
    finish(h.aio_pread_structured(buffer, 0, chunk))
    assert bytes(buffer) == data
print(refused)
"""


def test_resizing_what_is_behind_the_view_of_a_chunk_loses_no_data(nbdkit: StartServer) -> None:
    printed = output_of(CHUNKS, nbdkit("memory", "1M").socket)
    if sys.implementation.name == "cpython":  # which refuses all of it
        assert int(printed) == 2 * 20 * 2 * 3
