"""A callback forks: whatever the child does, the parent's call continues and gets its data.

The child is inside the parent's call, on the parent's connection.
"""

from __future__ import annotations

import pytest
from support.programs import run_program, run_silently
from support.servers import StartServer

PROGRAM = """
import gc, nbd, os, signal, sys, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def connected():
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.set_opt_mode({opt_mode})
    h.connect_unix(sys.argv[1])
    return h

def child():
    global h
    {work}
    sys.exit()

forked = []

def fork(*arguments):
    if forked:
        return
    forked.append(os.fork())
    if not forked[0]:
        child()
    status = os.waitpid(forked[0], 0)[1]
    assert status == 0, status

def fork_and_retire(error):
    fork()
    return 1

def drain():
    while h.aio_in_flight():
        assert h.poll(10_000) == 1, "nothing happened in " + h.connection_state()

signal.alarm(40)
h = connected()
data = b"x" * 4096
buffers = [bytearray(4096) for _ in range(4)]
if not h.get_opt_mode():
    h.pwrite(data, 0)
{call}
assert forked
if h.aio_is_negotiating():
    h.opt_go()
    h.pwrite(data, 0)
assert h.pread(4096, 0) == data
h.shutdown()
"""

WORK = {
    "ends": "pass",
    "ends at once": "os._exit(0)",
    "drops its handle": "del h; gc.collect()",
    "connects anew": "assert connected().get_protocol() == 'newstyle-fixed'",
}
CALLS = {
    "chunk": "assert h.pread_structured(4096, 0, fork) == data",
    "chunk, later": (
        "for b in buffers: h.aio_pread_structured(b, 0, fork, lambda error: 1)\n"
        "drain(); assert buffers == [data] * 4"
    ),
    "completion of a read": (
        "for b in buffers: h.aio_pread(b, 0, fork_and_retire)\n"
        "drain(); assert buffers == [data] * 4"
    ),
    "completion of a write": ("for _ in buffers: h.aio_pwrite(data, 0, fork_and_retire)\ndrain()"),
    "extent": "h.block_status(4096, 0, fork)",
    "extent, later": "h.aio_block_status(4096, 0, fork, lambda error: 1); drain()",
    "debug": "h.set_debug_callback(fork); h.set_debug(True); h.get_size(); h.set_debug(False)",
}
NEGOTIATION = {
    "list": "assert h.opt_list(fork) == 1",
    "context": "assert h.opt_list_meta_context(fork) == 1",
    "completion of a list": (
        "h.aio_opt_list(lambda *export: None, fork_and_retire)\n"
        "while not h.aio_is_negotiating(): assert h.poll(10_000) == 1"
    ),
}
CASES = [
    pytest.param(call, opt_mode, work, id=f"{name}, child {what}")
    for calls, opt_mode in ((CALLS, False), (NEGOTIATION, True))
    for name, call in calls.items()
    for what, work in WORK.items()
]


@pytest.mark.parametrize(("call", "opt_mode", "work"), CASES)
def test_a_child_that_is_forked_in_a_callback_leaves_the_call_to_its_parent(
    nbdkit: StartServer, call: str, opt_mode: bool, work: str
) -> None:
    program = PROGRAM.format(call=call, opt_mode=opt_mode, work=work)
    done = run_program(program, nbdkit("memory", "1M").socket)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_child_that_is_forked_in_a_callback_cannot_close_the_handle(nbdkit: StartServer) -> None:
    work = """
    try:
        h.close()
    except nbd.Error as error:
        assert error.errnum == __import__("errno").EDEADLK, error
        sys.exit()
    os._exit(1)
"""
    program = PROGRAM.format(call=CALLS["chunk"], opt_mode=False, work=work)
    run_silently(program, nbdkit("memory", "1M").socket)
