"""Handles that are dropped leak neither memory nor descriptors, and close no other handle."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
from support.handles import closed
from support.programs import output_of
from support.servers import StartServer
from support.sizes import MIB

import nbd

GROWTH = """
import nbd

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10

def drop(count):
    for _ in range(count):
        nbd.NBD()

drop(1000)
before = peak()
drop(20_000)
print(peak() - before)
"""

LIMITED = """
import resource, sys, nbd

limit, count, *arguments = sys.argv[1:]
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), hard))
kept = nbd.NBD()
for number in range(int(count)):
    h = nbd.NBD()
    if arguments:
        h.connect_unix(arguments[0])
    else:
        h.connect_command(["nbdkit", "-s", "--exit-with-parent", "null", "1M"])
    assert h.get_size() == 1 << 20
assert kept.aio_is_created()
"""


@pytest.mark.skipif(
    hasattr(ctypes.CDLL(None), "__asan_init"), reason="AddressSanitizer keeps freed memory"
)
def test_handles_without_end_need_no_more_memory_than_some() -> None:
    environ = {**os.environ, "PYPY_GC_NURSERY": str(64 * MIB)}
    command = [sys.executable, "-I", "-c", GROWTH]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert int(done.stdout) < 64 * MIB


@pytest.mark.parametrize(("limit", "count"), [(1024, 1100), (256, 400), (64, 100)])
def test_connections_that_are_dropped_do_not_use_up_the_descriptors(
    nbdkit: StartServer, limit: int, count: int
) -> None:
    output_of(LIMITED, str(limit), str(count), nbdkit("null", "1M").socket)


def test_servers_of_handles_that_are_dropped_do_not_use_up_the_descriptors() -> None:
    output_of(LIMITED, "64", "40")


def test_a_handle_that_is_referenced_stays_open() -> None:
    kept = [nbd.NBD() for _ in range(10)]
    for _ in range(1000):
        nbd.NBD()
    assert not any(closed(handle) for handle in kept)
