"""Ctrl-C ends a handle's call, a file and an event loop, although the server hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest
from support.files import BUFFERINGS
from support.programs import run_program
from support.servers import TIMEOUT, StartServer
from support.signals import alarm
from support.waits import paused

import nbd

BOUND = 20.0  # seconds; closing waits for about one, and the machine may be busy


READ = """
import sys, nbd
with nbd.NBD() as h:
    h.connect_unix(sys.argv[1])
    print("reads", flush=True)
    h.pread(512, 0)
"""


def test_ctrl_c_ends_a_program_that_waits(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M", "--filter=delay", "rdelay=600")
    with subprocess.Popen(
        [sys.executable, "-c", READ, server.socket],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "reads\n"
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=TIMEOUT)
    assert "KeyboardInterrupt" in errors
    assert program.returncode != 0


def test_ctrl_c_ends_a_read(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")
    interrupt = alarm(signal.default_int_handler)
    with nbd.open(server.uri) as disk, paused(server), interrupt, pytest.raises(KeyboardInterrupt):
        disk.read()


def press_ctrl_c(disk: Any) -> None:
    """Write, and be interrupted in code outside of the file."""
    disk.write(b"abc")
    raise KeyboardInterrupt


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_ctrl_c_in_the_programs_own_code_leaves_a_file_whose_server_hangs(
    nbdkit: StartServer, buffering: int
) -> None:
    server = nbdkit("memory", "16M")
    disk: Any = nbd.open(server.uri, "r+b", buffering=buffering)
    start = time.monotonic()
    with paused(server), pytest.raises(KeyboardInterrupt), disk:
        press_ctrl_c(disk)
    assert disk.closed
    assert time.monotonic() - start < BOUND


def test_a_server_that_the_file_has_started_and_that_hangs_is_ended() -> None:
    program = """
import os, signal, sys, time
import nbd
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
try:
    server = ["sh", "-c", "echo $$ >$0; exec nbdkit -s memory 1M", sys.argv[1]]
    with nbd.open(server, "r+b") as disk:
        with open(sys.argv[1]) as file: os.kill(int(file.read()), signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        disk.read(100)
except KeyboardInterrupt:
    print("ended")
"""
    path = f"/tmp/nbd-pid-{os.getpid()}"
    try:
        done = run_program(program, path)
    finally:
        os.unlink(path)
    assert (done.stdout, done.stderr) == ("ended\n", "")


ASYNCIO_RUN = """
    import asyncio, signal, sys, nbd

    # If the parent ignores SIGINT, so does Python.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def say(what):
        print(what, flush=True)

    async def main():
        async with nbd.aio.connect(sys.argv[1]) as disk:
            asyncio.get_running_loop().call_later(0.05, say, "waiting")
            try:
                await asyncio.gather(*(disk.pread(512, 0) for _ in range(9)))
            finally:
                say("left")

    try:
        asyncio.run(main(), debug=True)
    except KeyboardInterrupt:
        say("interrupted")
"""


def test_ctrl_c_ends_asyncio_run_at_once(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=delay", "memory", "1M", "rdelay=60")
    program = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(ASYNCIO_RUN)]
    with subprocess.Popen(
        [*program, server.uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert (out.split(), errors) == (["left", "interrupted"], "")
