"""No kind of call, callback, error or handle leaks, however often it is repeated."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from support import leak_loops
from support.figures import Figure, pass_on
from support.forms import SOAK
from support.programs import finds_support
from support.servers import StartServer

HANG = 1800 if SOAK else 120  # seconds until the loops of a group are considered to hang


@pytest.mark.skipif(
    hasattr(ctypes.CDLL(None), "__asan_init"), reason="AddressSanitizer keeps freed memory"
)
@pytest.mark.parametrize("group", leak_loops.GROUPS)
def test_loops_leave_nothing(group: str, nbdkit: StartServer, figure: Figure) -> None:
    disk = nbdkit("memory", "1M").socket
    failing = nbdkit("memory", "1M", "--filter=error", "error=EIO", "error-rate=100%").socket
    done = subprocess.run(
        [sys.executable, "-m", "support.leak_loops", group, disk, failing],
        env=finds_support(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert (done.returncode, done.stderr) == (0, "")
    pass_on(done.stdout, figure)
    figures = [line.rpartition(": ")[::2] for line in done.stdout.splitlines()]
    assert [one for one in figures if one[1] != "0" and not one[0].endswith(": calls")] == []
