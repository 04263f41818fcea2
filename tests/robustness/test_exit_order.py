"""A program exits while exit functions, finalizers and threads still use handles."""

from __future__ import annotations

import pytest
from support.programs import run_program, run_silently
from support.servers import StartServer

CONNECTED = """
import atexit, sys, threading, time, weakref

def connected():
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.connect_unix(sys.argv[1])
    return h

def use_everything():
    with connected() as new:
        new.pwrite(b"late", 0)
        new.block_status(4096, 0, lambda *extent: None)
        buf = nbd.Buffer(4)
        cookie = new.aio_pread(buf, 0)
        while not new.aio_command_completed(cookie):
            new.poll(-1)
        print(bytes(buf), len(nbd.Buffer(1 << 20)))
"""

EVERYTHING = "b'late' 1048576\n"
CLOSED = "ClosedHandle\n"
READ = "bytearray(b'\\x00')\n"

# Functions that run after the handles were closed find them closed, and may make new ones.
USE = """
def use():
    try:
        print(h.pread(1, 0))
    except nbd.ClosedHandle as error:
        print(type(error).__name__)
"""

PROGRAMS = {
    "exit function that was there before nbd": (
        "import atexit; atexit.register(lambda: use())",
        USE + "h = connected()",
        CLOSED,
    ),
    "exit function that came after nbd": (
        "",
        USE + "h = connected(); atexit.register(use)",
        READ,
    ),
    "exit function that closes": ("", "h = connected(); atexit.register(h.close)", ""),
    "new handle in an exit function that was there before nbd": (
        "import atexit; atexit.register(lambda: use_everything())",
        "h = connected()",
        EVERYTHING,
    ),
    "new handles one after the other in an exit function that was there before nbd": (
        "import atexit; atexit.register(lambda: [use_everything(), use_everything()])",
        "h = connected()",
        2 * EVERYTHING,
    ),
    "new handle that an exit function leaves open": (
        "import atexit; atexit.register(lambda: leave())",
        "def leave():\n"
        "    global left\n"
        "    left = connected()\n"
        "    left.aio_pread(nbd.Buffer(512), 0, lambda error: 1)\n",
        "",
    ),
    "weakref.finalize from before nbd": (
        "import weakref\nclass Thing: pass\n"
        "thing = Thing(); weakref.finalize(thing, lambda: use())",
        USE + "h = connected()",
        CLOSED,
    ),
    "weakref.finalize from after nbd": (
        "",
        USE + "class Thing: pass\nthing = Thing()\n"
        "h = connected(); weakref.finalize(thing, lambda: use())",
        READ,
    ),
    "thread that outlives the main one": (
        "",
        "h = connected()\n"
        "def work():\n"
        "    time.sleep(0.5)\n"
        "    for _ in range(20): h.pread_structured(512, 0, lambda *chunk: None)\n"
        "    use_everything()\n"
        "threading.Thread(target=work).start()",
        EVERYTHING,
    ),
    "generator inside of a with statement": (
        "",
        "def reads():\n"
        "    with connected() as h:\n"
        "        yield h.pread(1, 0)\n"
        "kept = reads(); print(next(kept)); sys.kept = kept",
        READ,
    ),
    "nbd taken out of sys.modules": (
        "",
        "import gc\nh = connected()\n"
        "for name in [one for one in sys.modules if one.partition('.')[0] == 'nbd']:\n"
        "    del sys.modules[name]\n"
        "del nbd; gc.collect(); print(h.pread(1, 0))",
        READ,
    ),
}


@pytest.mark.parametrize(("before", "after", "expected"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_ends_with(nbdkit: StartServer, before: str, after: str, expected: str) -> None:
    program = "\n".join([before, "import nbd", CONNECTED, after])
    done = run_program(program, nbdkit("memory", "1M").socket)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


# PyPy runs no finalizers at exit.  On CPython, objects that a finalizer needs may already be gone.
# Therefore the test only requires a clean exit.
FINALIZERS = {
    "reads from its handle": "self.h.pread(1, 0)",
    "closes its handle": "self.h.close()",
    "leaves the with statement": "self.h.__exit__(None, None, None)",
    "makes a handle": "x = self.NBD(); x.set_debug_callback(print); x.close()",
    "makes a buffer": "self.Buffer(1 << 20)[0] = 1; self.Buffer(512).is_zero()",
    "connects": "x = self.NBD(); x.connect_unix(self.path); x.pread(1, 0)",
}
HOLDERS = {
    "a global": "holder = Holder()",
    "another module": "sys.holder = Holder()",
    "builtins": "import builtins; builtins.holder = Holder()",
    "a cycle": "holder = Holder(); holder.holder = holder",
}


@pytest.mark.parametrize("work", FINALIZERS.values(), ids=FINALIZERS)
@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_a_program_ends_with_a_finalizer_that(nbdkit: StartServer, holder: str, work: str) -> None:
    program = f"""
import nbd
{CONNECTED}
class Holder:
    def __init__(self):
        self.NBD, self.Buffer, self.path, self.h = nbd.NBD, nbd.Buffer, sys.argv[1], connected()

    def __del__(self, Exception=Exception):
        try:
            {work}
        except Exception:
            pass

{holder}
"""
    run_silently(program, nbdkit("memory", "1M").socket)
