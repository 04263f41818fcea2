"""Closing a client is bounded by its timeout, can be cancelled, and never delays the exit."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.asyncs import run
from support.hostile import Wire
from support.programs import run_program
from support.servers import children, program

import nbd

BOUND = 30  # seconds within which a bounded wait ends, even on a busy machine


@contextmanager
def server_that_stays() -> Iterator[list[str]]:
    """Yield a command that serves a disk, and keeps running after its client disconnected."""
    before = set(children())
    script = f"exec 2>/dev/null; {program('nbdkit')} -s memory 1M; exec sleep 600 >/dev/null <&-"
    try:
        yield ["sh", "-c", script]
    finally:
        for pid in set(children()) - before:
            os.kill(pid, signal.SIGKILL)


def test_closing_waits_for_a_server_that_stays_no_longer_than_the_timeout() -> None:
    async def main(command: list[str]) -> float:
        disk = await nbd.aio.connect(command, timeout=1)
        assert await disk.pread(512, 0) == bytes(512)
        began = time.monotonic()
        await disk.close()
        return time.monotonic() - began

    with server_that_stays() as command:
        assert run(main(command)) < BOUND


def test_closing_waits_for_a_server_that_ends() -> None:
    async def main() -> None:
        async with nbd.aio.connect([program("nbdkit"), "-s", "memory", "1M"], timeout=60):
            assert set(children()) - before
        assert not set(children()) - before

    before = set(children())
    run(main())


def test_closing_can_be_cancelled() -> None:
    async def main(command: list[str]) -> None:
        disk = await nbd.aio.connect(command)
        closing = asyncio.ensure_future(disk.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(closing, BOUND)
        await disk.close()

    with server_that_stays() as command:
        run(main(command))


END = """
import asyncio, nbd, sys

async def main():
    disk = await nbd.aio.connect(sys.argv[2:])
    closing = asyncio.ensure_future(disk.close())
    await asyncio.sleep(0.05)
    if sys.argv[1] == "cancelled":
        closing.cancel()
    print("end")

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["cancelled", "left behind"])
def test_a_program_ends_whose_server_stays(how: str) -> None:
    script = f"exec 2>/dev/null; {program('nbdkit')} -s memory 1M; exec sleep 90 >/dev/null <&-"
    began = time.monotonic()
    done = run_program(END, how, "sh", "-c", script)
    assert (done.stdout, done.returncode) == ("end\n", 0)
    assert time.monotonic() - began < BOUND


def test_a_server_that_keeps_the_connection_costs_a_closing_client_nothing() -> None:
    def stay(wire: Wire) -> None:
        wire.negotiate(structured=False)
        wire.linger()
        wait.wait(3 * BOUND)

    async def main() -> float:
        disk = await nbd.aio.connect(f"nbd://127.0.0.1:{port}")
        began = time.monotonic()
        await disk.close()
        return time.monotonic() - began

    def accept() -> None:
        sock, _ = listener.accept()
        with sock:
            try:
                stay(Wire(sock))
            except Exception:
                wait.wait(3 * BOUND)

    wait = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=accept)
        thread.start()
        assert run(main()) < BOUND
        wait.set()
        thread.join()
