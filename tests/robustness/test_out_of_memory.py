"""Each allocation of the shim fails in turn: an exception reports it, and nothing is lost.

The tests run this file as a program, `python test_out_of_memory.py SCENARIO`, with a malloc that
fails on request (c/preload/fail_malloc.c). The program lets the first allocation of the scenario
fail, then the second, and so on until the scenario succeeds, and prints the number of allocations.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from support.figures import Figure
from support.handles import drain
from support.programs import TESTS, finds_support
from support.sizes import MIB

import nbd
from nbd._binding import callbacks
from nbd._binding.shim import IS_FREE_THREADED

SOURCE = TESTS / "c" / "preload" / "fail_malloc.c"


class Scenario(NamedTuple):
    """A handle, and a call on it that runs out of memory."""

    make: Callable[[], nbd.NBD] | None
    run: Callable[[Any, bytearray], object]
    allocations: int


def connected(opt_mode: bool = False) -> nbd.NBD:
    """Return a handle with a disk of 1 MiB."""
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_opt_mode(opt_mode)
    h.connect_command(["nbdkit", "-s", "--exit-with-parent", "memory", "1M"])
    return h


def negotiating() -> nbd.NBD:
    """Return a handle in opt mode."""
    return connected(opt_mode=True)


def nothing(*_: object) -> int:
    """Callback that does nothing."""
    return 0


def retire(*_: object) -> int:
    """Completion callback that retires its command."""
    return 1


def create(_h: object, _room: object) -> None:
    nbd.NBD().close()


def connect(h: nbd.NBD, _room: object) -> None:
    h.connect_command(["nbdkit", "-s", "--exit-with-parent", "memory", "1M"])


def read(h: nbd.NBD, _room: object) -> None:
    h.pread(512, 0)


def read_structured(h: nbd.NBD, _room: object) -> None:
    h.pread_structured(512, 0, nothing)


def read_later(h: nbd.NBD, buffer: bytearray) -> None:
    h.aio_pread(buffer, 0, retire)


def read_later_without_callback(h: nbd.NBD, buffer: bytearray) -> None:
    h.aio_pread(buffer, 0)


def read_structured_later(h: nbd.NBD, buffer: bytearray) -> None:
    h.aio_pread_structured(buffer, 0, nothing, retire)


def write_later(h: nbd.NBD, buffer: bytearray) -> None:
    h.aio_pwrite(buffer, 0, retire)


def extents(h: nbd.NBD, _room: object) -> None:
    h.block_status(MIB, 0, nothing)


def extents_later(h: nbd.NBD, _room: object) -> None:
    h.aio_block_status(MIB, 0, nothing, retire)


def debug(h: nbd.NBD, _room: object) -> None:
    h.set_debug_callback(nothing)


def list_exports(h: nbd.NBD, _room: object) -> None:
    h.opt_list(nothing)


def list_contexts_later(h: nbd.NBD, _room: object) -> None:
    h.aio_opt_list_meta_context(nothing, retire)


def close(h: nbd.NBD, buffer: bytearray) -> None:
    h.aio_flush(retire)
    h.aio_pread_structured(buffer, 0, nothing, retire)
    h.close()


SCENARIOS = {
    "create": Scenario(None, create, 1),
    "connect": Scenario(nbd.NBD, connect, 0),
    "read": Scenario(connected, read, 1),
    "read_structured": Scenario(connected, read_structured, 2),
    "read_later": Scenario(connected, read_later, 1),
    "read_later_without_callback": Scenario(connected, read_later_without_callback, 1),
    "read_structured_later": Scenario(connected, read_structured_later, 2),
    "write_later": Scenario(connected, write_later, 1),
    "extents": Scenario(connected, extents, 2),
    "extents_later": Scenario(connected, extents_later, 2),
    "debug": Scenario(connected, debug, 1),
    "list_exports": Scenario(negotiating, list_exports, 2),
    "list_contexts_later": Scenario(negotiating, list_contexts_later, 2),
    "close": Scenario(connected, close, 3),
}


def shim() -> Path:
    """Return the path of the shim's shared object."""
    (found,) = Path(nbd.__file__).parent.rglob("*.so")
    return found.resolve()


def fail_each(scenario: Scenario) -> int:
    """Let each allocation of a scenario fail in turn; return their number."""
    fail_malloc = ctypes.CDLL(None)
    assert fail_malloc.fail_malloc_of(os.fsencode(shim())) == 1
    failing = 0
    is_untouched = False
    while not is_untouched:
        failing += 1
        h = scenario.make() if scenario.make else None
        buffer = bytearray(512)
        raised = None
        fail_malloc.fail_malloc_at(failing)
        try:
            scenario.run(h, buffer)
        except (MemoryError, nbd.Error) as reason:
            raised = reason.with_traceback(None)  # its frames refer to the buffer
        is_untouched = fail_malloc.fail_malloc_at(0) < failing
        check(raised, is_untouched)
        if h is not None:
            finish(h)
        gc.collect()
        buffer.extend(b"can be resized")
        assert not callbacks.registry
    return failing - 1


def check(raised: MemoryError | nbd.Error | None, is_untouched: bool) -> None:
    """Return whether the exception is the right one."""
    if is_untouched:
        assert raised is None, repr(raised)
    elif isinstance(raised, nbd.Error):
        assert raised.errnum == errno.ENOMEM, repr(raised)
    else:
        assert raised is not None


def finish(h: nbd.NBD) -> None:
    """Use the handle again, unless the scenario has closed it, and close it."""
    try:
        if h.aio_is_ready():
            drain(h)
            assert h.pread(512, 0) == bytes(512)
        h.get_debug()
        h.close()
    except nbd.ClosedHandle:
        pass


@pytest.fixture(scope="session")
def fail_malloc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library with a malloc that fails on request."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (Debian package: gcc)")
    if hasattr(ctypes.CDLL(None), "__asan_init"):
        pytest.skip("AddressSanitizer has a malloc of its own")
    library = tmp_path_factory.mktemp("fail_malloc") / "fail_malloc.so"
    flags = ["-D_GNU_SOURCE", "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_allocation_of_the_shim_may_fail(
    name: str, fail_malloc: Path, figure: Figure
) -> None:
    done = subprocess.run(
        [sys.executable, __file__, name],
        env={**finds_support(), "LD_PRELOAD": str(fail_malloc), "LIBNBD_DEBUG": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == SCENARIOS[name].allocations
    figure("out of memory: allocations of the shim made to fail", int(done.stdout))


# Without the GIL, CPython's allocator gets 1 << 45 bytes of address space.
@pytest.mark.parametrize("size", [*([] if IS_FREE_THREADED else [1 << 45]), 1 << 62, sys.maxsize])
def test_a_buffer_that_does_not_fit_is_a_memory_error(size: int) -> None:
    with pytest.raises((MemoryError, OverflowError)):
        nbd.Buffer(size)


@pytest.mark.skipif(
    hasattr(ctypes.CDLL(None), "__asan_init"), reason="AddressSanitizer prints a warning as well"
)
def test_a_buffer_that_does_not_fit_raises_an_exception_and_prints_nothing() -> None:
    program = """
import nbd
for _ in range(1000):
    try:
        nbd.Buffer(1 << 62)
    except MemoryError:
        continue
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_read_that_does_not_fit_leaves_the_handle_usable(disk: nbd.NBD) -> None:
    with pytest.raises((MemoryError, nbd.Error, OverflowError)):
        disk.pread(1 << 62, 0)
    assert disk.pread(4, 0) == bytes(4)


if __name__ == "__main__":
    print(fail_each(SCENARIOS[sys.argv[1]]))
