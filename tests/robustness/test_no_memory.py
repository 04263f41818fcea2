"""Without memory for a Python object, a call raises MemoryError, and the handle stays usable.

The programs limit their address space, and request more than remains.
"""

from __future__ import annotations

import ctypes
import sys

import pytest
from support.programs import run_program, run_silently
from support.servers import StartServer

from nbd._binding.shim import IS_FREE_THREADED

pytestmark = [
    pytest.mark.skipif(
        hasattr(ctypes.CDLL(None), "__asan_init"), reason="AddressSanitizer needs its address space"
    ),
    pytest.mark.skipif(
        sys.implementation.name == "pypy", reason="PyPy aborts where its own heap cannot grow"
    ),
    pytest.mark.skipif(
        IS_FREE_THREADED, reason="CPython without the GIL reserves address space before the limit"
    ),
]

PROGRAM = """
import gc, nbd, pickle, resource, sys
from pathlib import Path

LARGE = 48 << 20

def retire(error):
    return 1

def drain():
    while h.aio_in_flight():
        h.poll(-1)

h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_unix(sys.argv[1])
h.pwrite(b"x" * 4096, 0)
assert len(h.pread(1 << 20, 0)) == 1 << 20  # make late imports happen now
nbd.Buffer(1 << 20)
pickle.dumps(nbd.Buffer(1))
given = bytearray(LARGE)
full = nbd.Buffer(LARGE)
full[0] = 1
text = "x" * LARGE

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        {call}
    except MemoryError:
        assert {fails}
    else:
        assert not {fails}
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
drain()
gc.collect()
assert h.pread(4096, 0) == b"x" * 4096
buf = bytearray(4096)
h.aio_pread(buf, 0, retire)
drain()
assert buf == b"x" * 4096
given.append(1)
assert full[0] == 1
"""

FAILS = {
    "pread": "h.pread(LARGE, 0)",
    "pread_structured": "h.pread_structured(LARGE, 0, lambda *chunk: None)",
    "Buffer": "nbd.Buffer(LARGE)",
    "Buffers": "[nbd.Buffer(1 << 20) for _ in range(64)]",
    "from_bytearray": "nbd.Buffer.from_bytearray(given)",
    "aio_pread": "h.aio_pread(nbd.Buffer(LARGE), 0, retire)",
    "to_bytearray": "full.to_bytearray()",
    "bytes": "bytes(full)",
    "slice": "full[:]",
    "slice with a step": "full[::2]",
    "list": "list(full)",
    "pickle": "pickle.dumps(full)",
    "text": "h.set_export_name(text)",
    "URI": "h.connect_uri(text)",
    "command": "nbd.NBD().connect_command(['x' * 1000] * (1 << 16))",
    "many handles": "[nbd.NBD() for _ in range(1 << 16)]",
}
SUCCEEDS = {
    "pwrite": "h.pwrite(given, 4096)",
    "aio_pwrite": "h.aio_pwrite(given, 4096, retire); drain()",
    "aio_pread into an existing buffer": "h.aio_pread(given, 0, retire); drain()",
    "aio_pread_structured": (
        "h.aio_pread_structured(given, 0, lambda *chunk: None, retire); drain()"
    ),
    "is_zero": "full.is_zero()",
    "set a slice": "full[1:] = memoryview(given)[1:]",
}


@pytest.mark.parametrize("call", FAILS.values(), ids=FAILS)
def test_no_memory_is_a_memory_error(nbdkit: StartServer, call: str) -> None:
    program = PROGRAM.format(call=call, fails=True)
    done = run_program(program, nbdkit("memory", "128M").socket)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("call", SUCCEEDS.values(), ids=SUCCEEDS)
def test_a_call_on_a_large_buffer_takes_no_memory(nbdkit: StartServer, call: str) -> None:
    program = PROGRAM.format(call=call, fails=False)
    done = run_program(program, nbdkit("memory", "128M").socket)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_callback_without_memory_makes_the_call_fail_with_that_cause(
    nbdkit: StartServer,
) -> None:
    call = """
        try:
            h.block_status(4096, 0, lambda *extent: bytearray(LARGE))
        except nbd.Error as error:
            assert type(error.__cause__) is MemoryError
            raise error.__cause__
"""
    program = PROGRAM.format(call=call.strip(), fails=True)
    run_silently(program, nbdkit("memory", "128M").socket)
