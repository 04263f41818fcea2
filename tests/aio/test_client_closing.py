"""Waits of nbd.aio that end: with the timeout, with the task, and with the program."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.asyncs import outcome, run
from support.hostile import Wire
from support.programs import run_program
from support.servers import StartServer, children, listening_unix, program
from support.sizes import MIB
from support.usage import descriptors
from support.waits import paused

import nbd

HUGE = [float("inf"), 1e12, 1e300, 10**15]
SECONDS = 10  # within which something bounded has to end on a busy machine


@contextmanager
def server_that_stays() -> Iterator[list[str]]:
    """A command that serves a disk, and does not end when its client has gone."""
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
        assert run(main(command)) < SECONDS


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
            await asyncio.wait_for(closing, SECONDS)
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
    script = f"exec 2>/dev/null; {program('nbdkit')} -s memory 1M; exec sleep 30 >/dev/null <&-"
    began = time.monotonic()
    done = run_program(END, how, "sh", "-c", script)
    assert (done.stdout, done.returncode) == ("end\n", 0)
    assert time.monotonic() - began < 20


def test_a_server_that_keeps_the_connection_costs_a_closing_client_nothing() -> None:
    def stay(wire: Wire) -> None:
        wire.negotiate(structured=False)
        wire.linger()
        wait.wait(SECONDS)

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
                wait.wait(SECONDS)

    wait = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=accept)
        thread.start()
        assert run(main()) < SECONDS / 2
        wait.set()
        thread.join()


#: The process is stopped in the middle of the wait, for longer than its timeout.
SUSPENDED = """
import asyncio, nbd, os, subprocess, sys

async def main(uri):
    async def wait(awaited):
        waiting = asyncio.ensure_future(awaited)
        await asyncio.sleep(0.05)
        stop = f"sleep 0.1; kill -STOP {os.getpid()}; sleep 2; kill -CONT {os.getpid()}"
        with subprocess.Popen(["sh", "-c", stop]):
            return await waiting

    if sys.argv[2] == "connect":
        disk = await wait(nbd.aio.connect(uri, timeout=1))
    else:
        disk = await nbd.aio.connect(uri, timeout=1)
        if sys.argv[2] == "pread":
            assert len(await wait(disk.pread(4096, 0))) == 4096
        elif sys.argv[2] == "line":
            reads = asyncio.gather(*(disk.pread(512, 0) for _ in range(100)))
            assert len(await wait(reads)) == 100
        else:
            await wait(disk.block_status(512, 0, lambda *extents: 0))
    await disk.close()
    print("in time")

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("call", ["connect", "pread", "line", "block_status"])
def test_a_process_that_was_suspended_is_not_late(nbdkit: StartServer, call: str) -> None:
    delay = {"connect": "delay-open=500ms", "block_status": "delay-extents=500ms"}
    options = delay.get(call, "rdelay=5ms" if call == "line" else "rdelay=500ms")
    done = run_program(SUSPENDED, nbdkit("--filter=delay", "memory", "1M", options).uri, call)
    assert (done.stdout, done.stderr) == ("in time\n", "")


def test_a_loop_that_stood_still_for_longer_than_the_timeout_is_not_late(
    nbdkit: StartServer,
) -> None:
    async def main() -> None:
        async with nbd.aio.connect(nbdkit("memory", "16M").uri, timeout=0.5) as disk:
            read = asyncio.ensure_future(disk.pread(8 * MIB, 0))
            await asyncio.sleep(0)
            time.sleep(1)
            assert await read == bytes(8 * MIB)

    run(main())


@pytest.mark.parametrize("seconds", HUGE)
def test_huge_and_infinite_numbers_are_for_ever(nbdkit: StartServer, seconds: Any) -> None:
    async def main() -> None:
        async with nbd.aio.connect(uri, timeout=seconds, retry_for=seconds) as disk:
            assert await disk.pread(512, 0) == bytes(512)
            await disk.block_status(512, 0, lambda *_: 0)

    uri = nbdkit("memory", "1M", tcp=True).uri.replace("127.0.0.1", "localhost")
    run(main())
    with nbd.connect(uri, timeout=seconds, retry_for=seconds) as h:
        assert h.pread(512, 0) == bytes(512)


@pytest.mark.parametrize("seconds", HUGE)
def test_an_infinite_retry_ends_when_the_server_comes(tmp_sock: str, seconds: Any) -> None:
    async def main() -> int:
        connecting = asyncio.ensure_future(
            nbd.aio.connect(f"nbd+unix:///?socket={tmp_sock}", retry_for=seconds).__aenter__()
        )
        await asyncio.sleep(0.05)
        with listening_unix(Path(tmp_sock)) as listener, server_on(listener):
            disk = await connecting
            size = disk.get_size()
            await disk.close()
            return size

    assert run(main()) == MIB


@contextmanager
def server_on(listener: socket.socket) -> Iterator[None]:
    """Serve one client of a socket."""

    def accept() -> None:
        sock, _ = listener.accept()
        with sock:
            try:
                Wire(sock).negotiate(structured=False)
                Wire(sock).linger()
            except Exception:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("-inf")])
@pytest.mark.parametrize("option", ["timeout", "retry_for"])
def test_other_numbers_of_seconds_are_refused(option: str, seconds: float) -> None:
    options: Any = {option: seconds}
    for connect in (nbd.connect, nbd.aio.connect):
        with pytest.raises(ValueError, match="is not more than 0"):
            connect("nbd://localhost", **options)


def test_a_host_that_is_no_name_is_an_error() -> None:
    for host in ("a..b", "x" * 70, "-", "\udcff"):
        error = run(outcome(nbd.aio.connect(f"nbd://{host}", timeout=20).__aenter__()))
        assert isinstance(error, nbd.Error), (host, error)


def test_a_second_use_of_a_connect_is_refused_while_the_first_is_open(nbdkit: StartServer) -> None:
    async def main() -> None:
        connecting = nbd.aio.connect(nbdkit("memory", "1M").uri)
        async with connecting as disk:
            with pytest.raises(RuntimeError, match=r"call nbd\.aio\.connect again for a"):
                async with connecting:
                    pytest.fail("it was entered twice")
            with pytest.raises(RuntimeError, match="close its client first"):
                await connecting
            assert await disk.pread(512, 0) == bytes(512)
        async with connecting as disk:
            assert await disk.pread(512, 0) == bytes(512)
        disk = await connecting
        with pytest.raises(RuntimeError, match="is in use"):
            await connecting
        await disk.close()
        await (await connecting).close()

    run(main())
    before = descriptors()
    run(main())
    assert descriptors() == before


def test_a_second_use_at_the_same_time_is_refused(nbdkit: StartServer) -> None:
    async def main() -> None:
        connecting = nbd.aio.connect(nbdkit("memory", "1M").uri)
        ended = await asyncio.gather(*(outcome(connecting) for _ in range(3)))
        assert sorted(type(one).__name__ for one in ended) == [
            "Client",
            "RuntimeError",
            "RuntimeError",
        ]
        for one in ended:
            if isinstance(one, nbd.aio.Client):
                await one.close()

    run(main())


def test_a_connect_that_has_failed_can_be_used_again(tmp_sock: str, nbdkit: StartServer) -> None:
    async def main() -> None:
        server = nbdkit("memory", "1M")
        connecting = nbd.aio.connect(server.uri, timeout=0.2)
        with paused(server):
            assert isinstance(await outcome(connecting), nbd.Timeout)
        async with connecting as disk:
            assert disk.get_size() == MIB

    run(main())


def test_a_client_of_a_loop_that_has_ended_does_not_keep_its_connect(nbdkit: StartServer) -> None:
    connecting = nbd.aio.connect(nbdkit("memory", "1M").uri)

    async def main() -> nbd.aio.Client:
        return await connecting

    async def close() -> None:
        async with connecting as disk:
            assert disk.get_size() == MIB

    left = asyncio.run(main())
    asyncio.run(close())
    with pytest.warns(ResourceWarning):
        left.__del__()


DESCRIPTORS = """
import asyncio, gc, nbd, resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
gc.disable()

async def main():
    for _ in range(100):
        disk = await nbd.aio.connect(sys.argv[1], connections=2)
        assert await disk.pread(512, 0) == bytes(512)
        await disk.close()

asyncio.run(main())
for _ in range(100):
    h = nbd.connect(sys.argv[1])
    h.close()
print("all")
"""


def test_closed_clients_keep_no_descriptor_until_garbage_is_collected(nbdkit: StartServer) -> None:
    done = run_program(DESCRIPTORS, nbdkit("memory", "1M").uri)
    assert (done.stdout, done.stderr) == ("all\n", "")


NO_DESCRIPTORS = """
import asyncio, errno, nbd, os, resource, sys

async def main(uri):
    async with nbd.aio.connect(uri):
        pass
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for free in range(8):
        try:
            async with nbd.aio.connect(uri):
                print("connected")
                break
        except (OSError, nbd.Error) as reason:
            assert (reason.errno in (errno.EMFILE, "EMFILE")), repr(reason)
        os.close(taken.pop())
        after = os.dup(taken[0])
        os.close(after)

asyncio.run(main(sys.argv[1]))
"""


def test_no_descriptor_left_is_emfile(nbdkit: StartServer) -> None:
    done = run_program(NO_DESCRIPTORS, nbdkit("memory", "1M").uri)
    assert (done.stdout, done.stderr) == ("connected\n", "")
