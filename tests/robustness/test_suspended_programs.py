"""A program is suspended for longer than its timeout, and accepts the reply that came meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.asyncs import run
from support.hostile import CMD_READ, HungUp, Wire, export_info
from support.programs import run_program
from support.servers import StartServer
from support.sizes import MIB

import nbd

TIMEOUT = 2.0  # a machine that runs other tests as well may stop both programs for a second
SIZE = 1 << 20  # more than the socket holds
PROGRAM = """
import sys
import nbd

with nbd.NBD() as h:
    h.connect_socket(int(sys.argv[1]))
    size = h.get_size()
    READ
    print(len(data))
"""
#: Code that reads the disk with the timeout.
READS = {
    "pread": f"h.settimeout({TIMEOUT}); data = h.pread(4096, 0) * (size // 4096)",
    "open": f"data = nbd.open(h, timeout={TIMEOUT}).read()",
    "copy": (
        f"import io; target = io.BytesIO(); nbd.copy(h, target, timeout={TIMEOUT}); "
        "data = target.getvalue()"
    ),
}


def answer_all(wire: Wire) -> None:
    """Answer reads until the client disconnects."""
    while True:
        request = wire.request()
        size = request.count if request.command == CMD_READ else 0
        wire.simple(request.cookie, payload=bytes(size))


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_an_answer_that_came_while_the_program_was_suspended_is_taken(read: str) -> None:
    ours, its = socket.socketpair()
    program = PROGRAM.replace("READ", read)
    with ours, its:
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(its.fileno())],
            pass_fds=[its.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        its.close()
        try:
            wire = Wire(ours)
            wire.negotiate(structured=False, info=[export_info(SIZE)])
            first = wire.request()
            os.kill(child.pid, signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)
            answering = threading.Thread(
                target=wire.simple, args=(first.cookie, 0, bytes(first.count))
            )
            answering.start()
            time.sleep(TIMEOUT + 0.5)
            os.kill(child.pid, signal.SIGCONT)
            answering.join()
            with suppress(HungUp):
                answer_all(wire)
            printed, _ = child.communicate(timeout=30)
        finally:
            child.kill()
            child.wait()
    assert printed == f"{SIZE}\n"
    assert child.returncode == 0


def test_a_copy_that_was_suspended_does_not_time_out(nbdkit: StartServer, tmp_path: Path) -> None:
    program = f"""
import os, signal
import nbd
is_begun = False
def begun(done, total):
    global is_begun
    if not is_begun:
        is_begun = True
        print("begun", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
print(nbd.copy({nbdkit("--filter=delay", "memory", "2M", "rdelay=100ms").uri!r},
    {str(tmp_path / "target")!r}, sparse=False, depth=4, progress=begun, timeout={TIMEOUT}))
"""
    command = [sys.executable, "-I", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(TIMEOUT + 0.5)
        process.send_signal(signal.SIGCONT)
        last = process.stdout.readlines()[-1]
    assert last == "Copied(copied=2097152, zeroed=0)\n"


def test_a_copy_of_a_pipe_that_was_suspended_does_not_time_out(nbdkit: StartServer) -> None:
    """Data that arrived while the process was stopped is there when it continues."""
    read, write = os.pipe()
    program = """
import os, sys
import nbd
h = nbd.connect(sys.argv[1])  # without a timeout: the handshake takes several replies
print("ready", flush=True)
print(nbd.copy(sys.stdin.buffer, h, timeout=0.5).copied)
"""
    command = [sys.executable, "-c", program, nbdkit("memory", "1M").uri]
    with (
        open(write, "wb", 0) as sink,
        subprocess.Popen(command, stdin=read, stdout=subprocess.PIPE) as process,
    ):
        os.close(read)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        sink.write(b"x" * 1000)
        sink.close()
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == b"1000\n"


#: The process is stopped during the wait, for longer than its timeout.
CLIENT = """
import asyncio, nbd, os, subprocess, sys

async def main(uri):
    async def wait(awaited):
        waiting = asyncio.ensure_future(awaited)
        await asyncio.sleep(0.05)
        stop = f"sleep 0.1; kill -STOP {os.getpid()}; sleep 2.5; kill -CONT {os.getpid()}"
        with subprocess.Popen(["sh", "-c", stop]):
            return await waiting

    if sys.argv[2] == "connect":
        disk = await wait(nbd.aio.connect(uri, timeout=1.5))
    else:
        disk = await nbd.aio.connect(uri, timeout=1.5)
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
def test_a_client_that_was_suspended_does_not_time_out(nbdkit: StartServer, call: str) -> None:
    delay = {"connect": "delay-open=300ms", "block_status": "delay-extents=300ms"}
    options = delay.get(call, "rdelay=5ms" if call == "line" else "rdelay=300ms")
    done = run_program(CLIENT, nbdkit("--filter=delay", "memory", "1M", options).uri, call)
    assert (done.stdout, done.stderr) == ("in time\n", "")


def test_a_loop_that_was_blocked_for_longer_than_the_timeout_does_not_time_out(
    nbdkit: StartServer,
) -> None:
    async def main() -> None:
        async with nbd.aio.connect(nbdkit("memory", "16M").uri, timeout=0.5) as disk:
            read = asyncio.ensure_future(disk.pread(8 * MIB, 0))
            await asyncio.sleep(0)
            time.sleep(1)
            assert await read == bytes(8 * MIB)

    run(main())
