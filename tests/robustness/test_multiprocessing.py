"""Handles, results and exceptions in processes of multiprocessing, with each start method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.servers import TIMEOUT, StartServer

# A file instead of -c, because a process that is not forked imports the program.
HEAD = """
import errno, multiprocessing, nbd, sys, warnings
# CPython 3.15 says so of the program when a process that was not forked formats a traceback.
warnings.filterwarnings("ignore", "Module globals is missing a __spec__", DeprecationWarning)
from concurrent.futures import ProcessPoolExecutor

def connected():
    h = nbd.NBD()
    h.connect_unix(sys.argv[2])
    return h

class Refused(nbd.Error):
    def __init__(self, string, errnum, place=None):
        super().__init__(string, errnum)
        self.place = place

def refuse():
    raise Refused("refused", errno.EACCES, "door")

def fail_for_a_reason():
    try:
        nbd.NBD().get_size()
    except nbd.Error as error:
        raise nbd.Error("no size", 0) from error

def use_closed():
    h = nbd.NBD()
    h.close()
    h.get_size()

def make_handle():
    return nbd.NBD()

def make_buffer():
    return nbd.Buffer.from_bytearray(b"from there")

def write_and_read(at):
    with connected() as h:
        h.pwrite(b"child", at)
        buf = nbd.Buffer(5)
        cookie = h.aio_pread(buf, at)
        while not h.aio_command_completed(cookie):
            h.poll(-1)
        return bytes(buf)

def raised(call):
    with context.Pool(1) as pool:
        try:
            pool.apply(call)
        except Exception as error:
            return error

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
"""

PROGRAMS = {
    "processes have connections of their own": """
    h = connected()
    h.pwrite(b"parent", 0)
    buf = bytearray(6)
    cookie = h.aio_pread(buf, 0)
    with context.Pool(2) as pool:
        assert pool.map(write_and_read, [512, 1024]) == [b"child"] * 2
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    assert (buf, h.pread(5, 512)) == (b"parent", b"child")
""",
    "a process ends beside an open connection": """
    h = connected()
    process = context.Process(target=write_and_read, args=(512,))
    process.start()
    process.join()
    assert (process.exitcode, h.pread(5, 512)) == (0, b"child")
""",
    "a Buffer is copied": """
    with context.Pool(1) as pool:
        buf = pool.apply(make_buffer)
    assert (type(buf), bytes(buf)) == (nbd.Buffer, b"from there")
""",
    "an Error of a subclass arrives with its attributes": """
    error = raised(refuse)
    assert (type(error), error.args) == (Refused, ("refused", errno.EACCES))
    assert (error.errno, error.place) == ("EACCES", "door")
""",
    "an Error with a cause arrives with its cause": """
    error = raised(fail_for_a_reason)
    assert (type(error), error.args) == (nbd.Error, ("no size", 0))
    assert "nbd_get_size: " in str(error.__cause__)
""",
    "a ClosedHandle arrives": """
    error = raised(use_closed)
    assert type(error) is nbd.ClosedHandle and "closed" in str(error)
""",
    "a handle is refused as a result": """
    assert "it cannot be copied or pickled" in str(raised(make_handle))
""",
    "a handle is refused as an argument": """
    h = connected()
    with context.Pool(1) as pool:
        try:
            pool.apply(repr, (h,))
        except TypeError as error:
            assert "it cannot be copied or pickled" in str(error)
        else:
            raise AssertionError
    assert h.pread(1, 0) == b"\\0"
""",
}


def run_file(path: Path, program: str, *arguments: str) -> None:
    path.write_text(HEAD + program)
    command = [sys.executable, "-W", "error", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_with_multiprocessing(
    nbdkit: StartServer, tmp_path: Path, method: str, program: str
) -> None:
    run_file(tmp_path / "program.py", program, method, nbdkit("memory", "1M").socket)


def test_a_forked_process_closes_the_handle_it_was_given_for_itself_alone(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    program = """
    h = connected()
    h.pwrite(b"parent", 0)
    process = context.Process(target=h.close)
    process.start()
    process.join()
    assert (process.exitcode, h.pread(6, 0)) == (0, b"parent")
"""
    run_file(tmp_path / "program.py", program, "fork", nbdkit("memory", "1M").socket)


def test_a_process_pool_of_futures_gives_the_error(nbdkit: StartServer, tmp_path: Path) -> None:
    program = """
    with ProcessPoolExecutor(1) as pool:
        error = pool.submit(refuse).exception()
        closed = pool.submit(use_closed).exception()
    assert (type(error), error.errno, error.place) == (Refused, "EACCES", "door")
    assert type(closed) is nbd.ClosedHandle
"""
    run_file(tmp_path / "program.py", program, "fork", nbdkit("memory", "1M").socket)
