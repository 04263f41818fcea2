"""Storms of signals whose handlers raise, and a full stack, lose nothing and leak nothing."""

from __future__ import annotations

import re

import pytest
from support.figures import Figure, pass_on
from support.forms import SOAK
from support.programs import output_of, run_program
from support.servers import StartServer

# Both programs do this repeatedly, each time with memory that was used before.
OPERATIONS = """
import gc, sys, nbd

BLOCK, OLD, LARGE = 1536, 0xA5, 1 << 16
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_unix(sys.argv[1])
h.pwrite(bytes([1]) * LARGE, 0)

def use_blocks():
    for buffer in [nbd.Buffer(BLOCK) for _ in range(4)]:
        buffer[:] = bytes([OLD]) * BLOCK

def drive():
    while h.aio_in_flight():
        h.poll(-1)

def read(count):
    assert h.pread(count, 0) == bytes([1]) * count

def structured():
    seen = []
    result = h.pread_structured(BLOCK, 0, lambda part, *rest: seen.append(bytes(part)) or 0)
    assert result == b"".join(seen) == bytes([1]) * BLOCK

def status():
    seen = []
    h.block_status(LARGE, 0, lambda context, offset, extents, error: seen.append(extents) or 0)
    assert seen

buffers = []

def start(make, command):
    buffers.append(make(BLOCK))
    return command(buffers[-1])

def reading(buffer):
    return h.aio_pread(buffer, 0, lambda error: 1)

def reading_parts(buffer):
    return h.aio_pread_structured(buffer, 0, lambda *chunk: 0, lambda error: 1)

def waiting(buffer):
    cookie = h.aio_pread(buffer, 0)
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    assert bytes(buffer) == bytes([1]) * BLOCK

def look():
    buffer = nbd.Buffer(BLOCK)
    assert buffer.is_zero() and not any(buffer[5:]) and not any(bytes(buffer))

OPERATIONS = {
    "pread": lambda: read(BLOCK),
    "pread, large": lambda: read(LARGE),
    "pread_structured": structured,
    "pwrite": lambda: h.pwrite(bytes([1]) * BLOCK, 0),
    "block_status": status,
    "aio_pread": lambda: start(nbd.Buffer, reading),
    "aio_pread, bytearray": lambda: start(bytearray, reading),
    "aio_pread_structured": lambda: start(nbd.Buffer, reading_parts),
    "aio_pread, no callback": lambda: start(nbd.Buffer, waiting),
    "aio_pwrite": lambda: h.aio_pwrite(bytearray([1]) * BLOCK, 0, lambda error: 1),
    "poll": drive,
    "nbd.Buffer": look,
}

def check():
    '''After everything has ended: the bytes are those of the disk or zeroes.'''
    for buffer in buffers:
        assert set(bytes(buffer)) in ({0}, {1}), set(bytes(buffer))
        if isinstance(buffer, bytearray):
            gc.collect()
            buffer.append(0)
    buffers.clear()

def retire():
    drive()
    while True:
        try:
            cookie = h.aio_peek_command_completed()
        except nbd.Error:
            return
        try:
            h.aio_command_completed(cookie)
        except nbd.Error:  # the call fails if its callback was interrupted
            pass

def registered():
    gc.collect()
    gc.collect()
    return len(nbd._binding.callbacks.registry)
"""

# The handler raises only inside the package and inside the callbacks that it runs.
STORM = """
import os, signal, time

PACKAGE = os.path.dirname(nbd.__file__) + os.sep
made = []  # the exceptions that the handler has raised and no call has raised yet

class Interrupt(KeyboardInterrupt):
    pass

def handler(number, frame):
    if sys.implementation.name == "pypy" and lost():
        return  # PyPy loses an exception that `finally` re-raises, if another is raised there
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            if frame.f_code.co_name.startswith("_keep"):
                return  # two signals within microseconds: cffi drops an exception in its `onerror`
            made.append(Interrupt())
            raise made[-1]
        frame = frame.f_back

def lost():
    # The handler may be interrupted before it raises.
    return [one for one in made if one.__traceback__ is not None]

def note(error):
    global came_out
    is_ours, waiting, seen = False, [error], set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            is_ours |= isinstance(one, Interrupt)
            if one in made:  # otherwise it was seen before, as the context of another
                came_out += 1
                made.remove(one)
            waiting += [one.__cause__, one.__context__]
    return is_ours

def attempt(call):
    global calls
    calls += 1
    try:
        call()
    except BaseException as error:
        if not note(error):
            raise

def end_all():
    attempt(retire)
    while nbd._binding.errors.pending:  # each call raises one of them
        attempt(h.get_size)
    attempt(retire)

calls = rounds = came_out = 0
signal.signal(getattr(signal, sys.argv[2]), handler)
if sys.argv[2] == "SIGINT":  # setitimer sends SIGALRM, which is passed on as SIGINT
    signal.signal(signal.SIGALRM, lambda *ignored: os.kill(os.getpid(), signal.SIGINT))
end = time.monotonic() + float(sys.argv[3])
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while time.monotonic() < end:
    rounds += 1
    attempt(use_blocks)
    for operation in OPERATIONS.values():
        attempt(operation)
    if rounds % 16 == 0:
        signal.setitimer(signal.ITIMER_REAL, 0)
        end_all()
        check()
        assert registered() == 0, nbd._binding.callbacks.registry
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
signal.setitimer(signal.ITIMER_REAL, 0)
time.sleep(0.01)
end_all()
check()
assert registered() == 0
assert not lost(), len(lost())
print(f"storm of {sys.argv[2]}, calls: {calls}")
print(f"storm of {sys.argv[2]}, exceptions of its handler that came out of them: {came_out}")
"""

DEEP = """
operation = OPERATIONS[sys.argv[2]]
tries = failures = 0

def down():
    global tries, failures
    try:
        down()
    except RecursionError:
        pass
    if tries < 400:  # each time with space for one more frame
        tries += 1
        try:
            operation()
        except (RecursionError, nbd.Error):  # nbd.Error if a callback could not run
            failures += 1

use_blocks()
down()
retire()
check()
assert registered() == 0, nbd._binding.callbacks.registry
print(f"stack that is full: calls that failed: {failures}")
"""


@pytest.mark.parametrize("signal", ["SIGALRM", "SIGINT"])
def test_every_signal_of_a_storm_is_raised_by_a_call(
    nbdkit: StartServer, figure: Figure, signal: str
) -> None:
    seconds = "10" if SOAK else "1"
    printed = output_of(OPERATIONS + STORM, nbdkit("memory", "1M").socket, signal, seconds)
    pass_on(printed, figure)


@pytest.mark.parametrize(
    "operation",
    [
        *("pread", "pread, large", "pread_structured", "pwrite", "block_status", "nbd.Buffer"),
        *("aio_pread", "aio_pread, bytearray", "aio_pread_structured", "aio_pread, no callback"),
        *("aio_pwrite", "poll"),
    ],
)
def test_a_full_stack_leaves_nothing_behind(
    nbdkit: StartServer, figure: Figure, operation: str
) -> None:
    done = run_program(OPERATIONS + DEEP, nbdkit("memory", "1M").socket, operation)
    assert done.returncode == 0, done.stderr
    # If the stack is too full for a callback and for keeping the exception, it is printed.
    reported = [s for s in done.stderr.splitlines() if re.match(r"\w+(Error|Exception)\b", s)]
    assert [
        s for s in reported if not s.startswith(("RecursionError", "SystemError: callback"))
    ] == []
    pass_on(done.stdout, figure)
