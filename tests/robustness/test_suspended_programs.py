"""A program that was suspended for longer than its timeout, and whose answer has come meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from support.hostile import CMD_READ, HungUp, Wire, export_info

TIMEOUT = 0.5
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
#: What reads the disk, within the timeout.
READS = {
    "pread": f"h.settimeout({TIMEOUT}); data = h.pread(4096, 0) * (size // 4096)",
    "open": f"data = nbd.open(h, timeout={TIMEOUT}).read()",
    "copy": (
        f"import io; target = io.BytesIO(); nbd.copy(h, target, timeout={TIMEOUT}); "
        "data = target.getvalue()"
    ),
}


def answer_all(wire: Wire) -> None:
    """Answer reads until the client leaves; in the end it disconnects."""
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
            time.sleep(2 * TIMEOUT)
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
