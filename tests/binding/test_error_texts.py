"""Calls that wait fail with the same text and number as in libnbd's own module.

They are made of other functions of libnbd. One program runs with both modules, each in a separate
process, and prints how each call failed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from support.servers import TIMEOUT, program
from test_reference import SYSTEM_PYTHON, system

PROGRAM = """
import contextlib, json, os, signal, threading
import nbd

out = {}

def note(name, call):
    try:
        call()
        out[name] = "no error"
    except nbd.Error as error:
        out[name] = [error.string, error.errno]

def nbdkit(*arguments, opt=False):
    h = nbd.NBD()
    h.set_opt_mode(opt)
    h.connect_command(["nbdkit", "-s", "--exit-with-parent", *arguments])
    return h

def nothing(*arguments):
    return 0

def fails(*arguments):
    return -1

def fails_with_enospc(*arguments):
    arguments[-1].value = 28
    return -1

REFUSES = ("eval", "open=echo ENOENT nothing >&2; exit 1", "get_size=echo 1M")

h = nbd.NBD()
note("created: pread", lambda: h.pread(512, 0))
note("created: flush", lambda: h.flush())
note("created: opt_go", lambda: h.opt_go())
note("created: opt_abort", lambda: h.opt_abort())
note("created: poll", lambda: h.poll(0))
note("created: shutdown", lambda: h.shutdown())
note("connect_unix to nothing", lambda: h.connect_unix("/nowhere/sock"))
h = nbd.NBD()
note("connect_uri with a bad scheme", lambda: h.connect_uri("nbdx://"))
note("connect_tcp to nothing", lambda: h.connect_tcp("127.0.0.1", "1"))
note("dead: pread", lambda: h.pread(512, 0))
note("dead: poll", lambda: h.poll(0))
note("dead: shutdown", lambda: h.shutdown())
h = nbd.NBD()
note("connect_command that ends", lambda: h.connect_command(["false"]))
h = nbd.NBD()
note("connect_command that refuses", lambda: h.connect_command(["nbdkit", "-s", *REFUSES]))

h = nbdkit("memory", "1M")
note("pread past the end", lambda: h.pread(512, 1 << 20))
note("pread of nothing", lambda: h.pread(0, 0))
note("pread with a flag", lambda: h.pread(512, 0, 64))
note("pwrite with a flag", lambda: h.pwrite(b"x", 0, 1 << 20))
note("block_status without a context", lambda: h.block_status(512, 0, nothing))
note("connected: opt_list", lambda: h.opt_list(nothing))
note("connected: connect_unix", lambda: h.connect_unix("/nowhere/sock"))
note("shutdown with a flag", lambda: h.shutdown(1))
note("chunk that fails", lambda: h.pread_structured(512, 0, fails))
note("chunk that fails with ENOSPC", lambda: h.pread_structured(512, 0, fails_with_enospc))
note("shutdown", lambda: h.shutdown())
note("closed: pread", lambda: h.pread(512, 0))
note("closed: poll", lambda: h.poll(0))
note("closed: shutdown", lambda: h.shutdown())
h = nbdkit("memory", "1M")
note("shutdown, abandoning", lambda: h.shutdown(nbd.SHUTDOWN_ABANDON_PENDING))
h = nbdkit("memory", "1M")
h.aio_disconnect()
note("shutdown after aio_disconnect", lambda: h.shutdown())

h = nbdkit("--filter=error", "memory", "1M", "error=EIO")
note("EIO: pread", lambda: h.pread(512, 0))
note("EIO: pread_structured", lambda: h.pread_structured(512, 0, nothing))
note("EIO: pwrite", lambda: h.pwrite(b"x" * 512, 0))
note("EIO: zero", lambda: h.zero(512, 0))
note("EIO: trim", lambda: h.trim(512, 0))
h = nbdkit("eval", "get_size=echo 1M", "pread=exit 1")
note("read-only: pwrite", lambda: h.pwrite(b"x", 0))
note("read-only: trim", lambda: h.trim(1, 0))
note("a plugin that fails: pread", lambda: h.pread(1, 0))

h = nbdkit(*REFUSES, opt=True)
note("negotiating: pread", lambda: h.pread(1, 0))
note("refused: opt_go", lambda: h.opt_go())
note("refused: opt_info", lambda: h.opt_info())
note("refused: opt_list", lambda: h.opt_list(nothing))
note("refused: a second opt_list", lambda: h.opt_list(nothing))
note("refused: opt_list_meta_context", lambda: h.opt_list_meta_context(nothing))
for name in ("opt_starttls", "opt_structured_reply", "opt_extended_headers"):
    if hasattr(h, name):
        note(f"refused: {name}", getattr(h, name))
if hasattr(h, "opt_set_meta_context"):
    note("refused: opt_set_meta_context", lambda: h.opt_set_meta_context(nothing))
note("opt_abort", lambda: h.opt_abort())
note("after opt_abort: opt_go", lambda: h.opt_go())

def children():
    for process in filter(str.isdigit, os.listdir("/proc")):
        # Some of the machine's processes end meanwhile.
        with contextlib.suppress(OSError), open(f"/proc/{process}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[1] == str(os.getpid()):
                yield int(process)

h = nbdkit("memory", "1M", "--filter=delay", "rdelay=600")
threading.Timer(0.2, lambda: [os.kill(child, signal.SIGKILL) for child in children()]).start()
note("killed: pread", lambda: h.pread(512, 0))
note("killed: a second pread", lambda: h.pread(512, 0))
note("killed: poll", lambda: h.poll(0))
note("killed: shutdown", lambda: h.shutdown())
print(json.dumps(out))
"""


def failures(python: str) -> dict[str, Any]:
    """Run the program with a Python's module, and return how each call failed."""
    done = subprocess.run(
        [python, "-I", "-c", PROGRAM], capture_output=True, text=True, timeout=3 * TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    # nbdkit makes a folder with a random name for each script.
    found: dict[str, Any] = json.loads(re.sub(r"/nbdkit\w+/", "/nbdkit/", done.stdout))
    return found


@cache
def ours() -> dict[str, Any]:
    """Return how the calls of the module under test fail."""
    program("nbdkit")
    return failures(sys.executable)


def test_every_failure_has_the_words_of_libnbds_own_module() -> None:
    missing = system()
    if isinstance(missing, str):
        pytest.skip(missing)
    program("nbdkit")
    reference = failures(SYSTEM_PYTHON)
    assert len(reference) >= 50
    assert ours() == reference


def test_every_failure_names_the_call_that_was_made() -> None:
    inner = [text for text, *_ in ours().values() if str(text).startswith("nbd_aio_")]
    assert inner == []
