"""The server that connect_command starts becomes no zombie, however its handle ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import servers
from support.figures import Figure
from support.forms import SOAK
from support.programs import run_program

ROUNDS = 50 if SOAK else 3

# A process without other children, so that waitpid finds any child that is left.
PROGRAM = """
import gc, nbd, os, sys
nbdkit = [sys.argv[1], "-s", "--exit-with-parent", "memory", "1M"]

def connected(*more):
    h = nbd.NBD()
    h.connect_command([*nbdkit, *more])
    return h

def refused(command):
    h = nbd.NBD()
    try:
        h.connect_command([command])
    except nbd.Error:
        h.close()

def end():
    {end}

for _ in range({rounds}):
    end()
    gc.collect()
    try:
        print("left:", os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        pass
"""

ENDS = {
    "closed": "connected().close()",
    "dropped": "connected()",
    "shut down": "connected().shutdown()",
    "closed with commands in flight": """
    h = connected("--filter=delay", "rdelay=600")
    h.aio_pread(bytearray(512), 0, lambda error: 1)
    h.close()
""",
    "killed": """
    h = connected()
    h.kill_subprocess(9)
    h.close()
""",
    "never answered": "refused('true')",
    "not found": "refused('/nonexistent/nbdkit')",
    "started by socket activation": """
    h = nbd.NBD()
    h.connect_systemd_socket_activation(nbdkit[:1] + nbdkit[2:])
    h.shutdown()
    h.close()
""",
}


def run(program: str, *arguments: str) -> tuple[int, str]:
    """Run a program; return its status and output, without stderr, to which servers write."""
    done = run_program(program, *arguments)
    return done.returncode, done.stdout


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_wait_without_requests_returns_an_empty_list(end: str, figure: Figure) -> None:
    program = PROGRAM.format(end=end, rounds=ROUNDS)
    assert run(program, servers.program("nbdkit")) == (0, "")
    figure("sub-processes: handles after which none was left", ROUNDS)


def test_nothing_is_left_by_a_program_that_ends(tmp_path: Path) -> None:
    # Without a waitpid it would still run, or be a zombie, and keep its process ID.
    pid = tmp_path / "pid"
    program = """
import nbd, sys
h = nbd.NBD()
h.connect_command([sys.argv[1], "-s", "--exit-with-parent", "--pidfile", sys.argv[2], "null"])
"""
    assert run(program, servers.program("nbdkit"), str(pid)) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
