"""A signal handler raises at every bytecode of every method that registers something for libnbd.

The exception is raised by the call, nothing stays registered or pinned, and no byte of another
buffer becomes visible.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from support.figures import Figure
from support.handles import closed
from support.injection import Injector, came_out, chain, places
from support.servers import Server, StartServer
from support.sizes import MIB
from support.usage import registered

import nbd

BLOCK = 1536  # no other test uses this size, so the blocks in the pool are full of OLD
OLD = 0xA5
KEPT = 8  # how many blocks of that size the pool keeps


def takes(name: str) -> list[str]:
    """Return the parameters of a method."""
    return list(inspect.signature(getattr(nbd.NBD, name)).parameters)


def is_kept(name: str) -> bool:
    """Return whether a method keeps a callable or a buffer for libnbd."""
    annotations = str(inspect.signature(getattr(nbd.NBD, name)))
    return "Callback" in annotations or "Buffer" in annotations


NAMES = sorted(n for n in dir(nbd.NBD) if not n.startswith("_") and callable(getattr(nbd.NBD, n)))
KEEPING = [name for name in NAMES if is_kept(name)]
NEGOTIATING = [name for name in KEEPING if "opt_" in name]
COMMANDS = [name for name in KEEPING if name not in NEGOTIATING]


def arguments(name: str, done: Callable[..., int], buffer: Any) -> dict[str, Any]:
    """Return arguments for a method, by name."""
    known: dict[str, Any] = {
        "buf": buffer,
        "count": BLOCK,
        "offset": 0,
        "flags": 0,
        "name": "x",
        "queries": ["base:"],
        "contexts": [nbd.CONTEXT_BASE_ALLOCATION],
    }
    given = {}
    for parameter in takes(name)[1:]:
        given[parameter] = known.get(parameter, done)
    return given


def retire(h: nbd.NBD) -> None:
    """Run all commands to their end, and retire those that no completion retired."""
    while h.aio_in_flight():
        h.poll(1000)
    while cookie := completed(h):
        with suppress(nbd.Error):  # the call fails if its callback is interrupted
            h.aio_command_completed(cookie)


def completed(h: nbd.NBD) -> int:
    """Return the cookie of a command that waits to be retired, or 0."""
    try:
        return h.aio_peek_command_completed()
    except nbd.Error:
        return 0


@pytest.fixture
def server(qemu_nbd: StartServer, tmp_path: Path) -> Server:
    """Return a server with a disk of 1 MiB, with extended headers if it supports them."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    return qemu_nbd(image, "--format=raw", "--discard=unmap")


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., nbd.NBD]]:
    """Return a function that makes connected handles; they are closed afterwards."""
    made: list[nbd.NBD] = []

    def connected(opt_mode: bool = False) -> nbd.NBD:
        h = nbd.NBD()
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.set_opt_mode(opt_mode)
        h.connect_unix(server.socket)
        made.append(h)
        return h

    yield connected
    for h in made:
        if not closed(h):
            h.close()


@pytest.fixture(autouse=True)
def nothing_is_printed(unraisable: list[Any], capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Assert that no exception was only printed."""
    yield
    assert unraisable == []
    assert "Injected" not in capfd.readouterr().err


def use_blocks() -> None:
    """Leave blocks full of OLD in the pool."""
    buffers = [nbd.Buffer(BLOCK) for _ in range(KEPT)]
    for buffer in buffers:
        buffer[:] = bytes([OLD]) * BLOCK


def check_out(injector: Injector, error: BaseException | None, h: nbd.NBD) -> None:
    """Check that a call, or the next one, raised the injected exception."""
    if injector.raised and not came_out(error):
        with pytest.raises(KeyboardInterrupt):
            h.get_size()


def check_unpinned(buffer: Any) -> None:
    """Check that a bytearray can be resized."""
    if isinstance(buffer, bytearray):
        try:
            buffer.append(0)
        except BufferError:  # the frames of the exception may still refer to it
            gc.collect()
            buffer.append(0)
        buffer.pop()


@pytest.mark.parametrize("kind", [bytearray, nbd.Buffer], ids=["bytearray", "Buffer"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_method_that_keeps_something(
    connect: Callable[..., nbd.NBD], figure: Figure, name: str, kind: Callable[[int], Any]
) -> None:
    if kind is nbd.Buffer and "buf" not in takes(name):
        pytest.skip(f"{name} takes no buffer")
    h = connect()
    h.pwrite(b"\1" * MIB, 0)
    use_blocks()

    def once(injector: Injector) -> None:
        buffer = kind(BLOCK)
        given = arguments(name, lambda *arguments: 1 if len(arguments) == 1 else 0, buffer)
        error = injector.run(lambda: getattr(h, name)(**given))
        assert error is None or came_out(error), chain(error)
        error = None
        if "read" in name or "write" in name:
            assert OLD not in bytes(buffer)
        retire(h)
        if name == "set_debug_callback":
            h.clear_debug_callback()
        assert registered() == 0
        check_unpinned(buffer)
        if "write" in name or "trim" in name or "zero" in name:
            h.pwrite(b"\1" * BLOCK, 0)
        assert h.pread(BLOCK, 0) == b"\1" * BLOCK

    figure(f"injection: places in {name}", places(once))


@pytest.mark.parametrize("name", NEGOTIATING)
def test_a_method_of_the_negotiation(
    connect: Callable[..., nbd.NBD], figure: Figure, name: str
) -> None:
    h = connect(opt_mode=True)

    def once(injector: Injector) -> None:
        given = arguments(name, lambda *arguments: 0, None)
        error = injector.run(lambda: getattr(h, name)(**given))
        if error is not None and not came_out(error):
            assert isinstance(error, nbd.Error)
        error = None
        while h.aio_is_connecting():
            h.poll(1000)
        assert registered() == 0

    figure(f"injection: places in {name}", places(once))


def drive(h: nbd.NBD, cookies: list[int]) -> None:
    """Run commands to their end, and retire them."""
    while h.aio_in_flight():
        h.poll(1000)
    for cookie in cookies:
        h.aio_command_completed(cookie)


@pytest.mark.parametrize("retires", [True, False], ids=["retiring", "not retiring"])
def test_poll_and_command_completed_while_callbacks_run(
    connect: Callable[..., nbd.NBD], figure: Figure, retires: bool
) -> None:
    h = connect()
    h.pwrite(b"\1" * MIB, 0)
    use_blocks()

    def once(injector: Injector) -> None:
        buffers: list[Any] = [nbd.Buffer(BLOCK), nbd.Buffer(BLOCK), bytearray(BLOCK)]
        answer = 1 if retires else 0
        cookies = [
            h.aio_pread(buffers[0], 0, lambda error: answer),
            h.aio_pread_structured(buffers[1], 0, lambda *chunk: 0, lambda error: answer),
            h.aio_pread(buffers[2], 0, lambda error: answer),
            h.aio_block_status(BLOCK, 0, lambda *extent: 0, lambda error: answer),
        ]
        error = injector.run(lambda: drive(h, [] if retires else cookies))
        check_out(injector, error, h)
        error = None
        retire(h)
        assert registered() == 0
        assert [bytes(buffer) for buffer in buffers] == [b"\1" * BLOCK] * 3
        check_unpinned(buffers[2])

    figure("injection: places in poll and aio_command_completed", places(once))


def test_closing_with_commands_in_flight(connect: Callable[..., nbd.NBD], figure: Figure) -> None:
    def once(injector: Injector) -> None:
        h = connect()
        for _ in range(3):
            h.aio_pread(nbd.Buffer(BLOCK), 0, lambda error: 1)
        error = injector.run(h.close)
        assert not injector.raised or came_out(error)
        error = None
        if not closed(h):
            h.close()
        assert registered() == 0

    figure("injection: places in close", places(once))


def set_and_look(buffer: nbd.Buffer) -> bytearray:
    """Set a byte, and return the bytes after it."""
    buffer[5] = 1
    return buffer.to_bytearray()[6:]


LOOKS: dict[str, Callable[[nbd.Buffer], Any]] = {
    "bytes": bytes,
    "index": lambda buffer: bytes([buffer[7]]),
    "slice": lambda buffer: buffer[3:900],
    "to_buffer": lambda buffer: buffer.to_buffer(),
    "to_bytearray": lambda buffer: buffer.to_bytearray(),
    "iteration": lambda buffer: bytes(buffer),
    "is_zero": lambda buffer: b"" if buffer.is_zero() else b"\xa5",
    "set": lambda buffer: set_and_look(buffer),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looking_at_a_buffer_of_used_memory(figure: Figure, look: Callable[..., Any]) -> None:
    def once(injector: Injector) -> None:
        use_blocks()
        buffer = nbd.Buffer(BLOCK)
        seen: list[Any] = []
        error = injector.run(lambda: seen.append(look(buffer)))
        assert came_out(error) == injector.raised
        error = None
        assert not [1 for one in seen if OLD in bytes(one)]
        assert OLD not in buffer.to_bytearray()

    figure("injection: places in nbd.Buffer", places(once))


def test_making_a_buffer(figure: Figure) -> None:
    def once(injector: Injector) -> None:
        use_blocks()
        made: list[nbd.Buffer] = []
        error = injector.run(lambda: made.append(nbd.Buffer(BLOCK)))
        assert came_out(error) == injector.raised
        others = [nbd.Buffer(BLOCK) for _ in range(2 * KEPT)]
        assert not [1 for buffer in made + others if OLD in bytes(buffer)]
        for number, buffer in enumerate(others):
            buffer[:] = bytes([number]) * BLOCK
        assert [buffer[0] for buffer in others] == list(range(2 * KEPT))

    figure("injection: places in nbd.Buffer", places(once))


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="PyPy has no pool of blocks")
def test_a_second_init_of_a_buffer_shares_no_memory(figure: Figure) -> None:
    def once(injector: Injector) -> None:
        use_blocks()
        buffer: Any = nbd.Buffer(BLOCK)
        buffer[:] = b"\2" * BLOCK
        injector.run(lambda: buffer.__init__(BLOCK))
        others = [nbd.Buffer(BLOCK) for _ in range(2 * KEPT)]
        for other in others:
            other[:] = b"\3" * BLOCK
        assert bytes(buffer) in (b"\2" * BLOCK, bytes(BLOCK))

    figure("injection: places in nbd.Buffer", places(once))
