"""nbd is imported again in a process, as notebooks and test runners do when they reload code.

Each import works beside the others, and a command in flight ends with the callables it was given.
The classes of two imports may differ, so no test checks which nbd.Error was raised.
"""

from __future__ import annotations

from typing import Callable

import pytest
from support.programs import run_silently
from support.servers import StartServer

Runs = Callable[..., None]

PROGRAM = """
import errno, gc, importlib, sys, threading, weakref
import nbd as first

SOCKET = sys.argv[1]
MIB = 1 << 20
unraisable = []
sys.unraisablehook = lambda args: unraisable.append(args.exc_value)

def names():
    return [name for name in list(sys.modules) if name == "nbd" or name.startswith("nbd.")]

def modules_of_nbd():
    # cffi puts `lib` into sys.modules too; it cannot be imported by itself.
    return [name for name in names() if getattr(sys.modules[name], "__spec__", None)]

def import_again():
    for name in names():
        del sys.modules[name]
    return importlib.import_module("nbd")

def connected(module):
    h = module.NBD()
    h.add_meta_context("base:allocation")
    h.connect_unix(SOCKET)
    return h

def drain(h):
    while h.aio_in_flight():
        assert h.poll(20000) == 1

def collect():
    for _ in range(3):
        gc.collect()

def failure(call, *arguments):
    try:
        call(*arguments)
    except Exception as raised:
        return raised
    raise AssertionError("the call did not fail")

class Flight:
    # Commands in flight on a handle, and the arguments of their callbacks.

    def __init__(self, module, h, mark):
        self.h, self.called = h, []
        self.data = bytes([mark]) * 4096
        h.pwrite(self.data, 4096 * mark)
        self.buffers = [module.Buffer(4096), bytearray(4096), bytearray(4096)]
        call = self.called.append
        where = 4096 * mark
        h.aio_pread(self.buffers[0], where, lambda error: call(("read", error.value)) or 1)
        h.aio_pread(self.buffers[1], where, lambda error: call(("share", error.value)) or 1)
        h.aio_pread_structured(
            self.buffers[2],
            where,
            lambda view, offset, status, error: call(("chunk", bytes(view) == self.data)),
            lambda error: call(("parts", error.value)) or 1,
        )
        h.aio_block_status(
            MIB,
            0,
            lambda context, offset, entries, error: call(("extent", context, sum(entries[::2]))),
            lambda error: call(("status", error.value)) or 1,
        )
        self.plain = h.aio_pwrite(bytearray(self.data), where)

    def land(self):
        drain(self.h)
        assert self.h.aio_command_completed(self.plain)
        assert sorted(self.called) == [
            ("chunk", True),
            ("extent", "base:allocation", MIB),
            ("parts", 0),
            ("read", 0),
            ("share", 0),
            ("status", 0),
        ], self.called
        assert [bytes(buffer[:]) for buffer in self.buffers] == [self.data] * 3

def exercise(module, h):
    # Every kind of callback, and every kind of failure.
    Flight(module, h, 7).land()
    messages = []
    h.set_debug_callback(lambda function, message: messages.append(function))
    h.set_debug(True)
    assert h.pread(4096, 4096 * 7) == bytes([7]) * 4096
    h.set_debug(False)
    h.clear_debug_callback()
    assert "nbd_pread" in messages
    cause = LookupError("of an extent")
    def fail(*arguments):
        raise cause
    raised = failure(h.block_status, MIB, 0, fail)
    assert (raised.errno, raised.__cause__) == ("EPROTO", cause), raised
    raised = failure(h.pread, 512, MIB)
    assert (raised.errno, raised.__cause__) == ("EINVAL", None), raised
    h.aio_flush(fail)
    drain(h)
    collect()
    assert unraisable == [cause], unraisable
    unraisable.clear()
    def interrupt(*arguments):
        raise KeyboardInterrupt
    try:
        h.block_status(MIB, 0, interrupt)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("KeyboardInterrupt did not come out of the call")
    buffer = module.Buffer(8)
    assert buffer.is_zero() and len(buffer) == 8
    assert type(failure(h.pread, "1", 0)) is TypeError

"""


@pytest.fixture
def runs(nbdkit: StartServer) -> Runs:
    """Run a program with a server; it must exit with status 0 and print nothing."""
    server = nbdkit("memory", "1M")

    def run(program: str, *arguments: str) -> None:
        run_silently(PROGRAM + program, server.socket, *arguments)

    return run


def test_a_handle_of_the_first_import_works_after_the_second(runs: Runs) -> None:
    runs("""
h = connected(first)
second = import_again()
exercise(first, h)
exercise(first, connected(first))
""")


def test_the_second_import_works(runs: Runs) -> None:
    runs("""
second = import_again()
assert second is not first
exercise(second, connected(second))
""")


def test_both_imports_work_in_turn(runs: Runs) -> None:
    runs("""
h = connected(first)
second = import_again()
g = connected(second)
for _ in range(3):
    exercise(first, h)
    exercise(second, g)
assert h.pread(512, 0) == g.pread(512, 0) == bytes(512)
""")


def test_commands_in_flight_at_the_second_import_call_their_own_callables(runs: Runs) -> None:
    runs("""
flight = Flight(first, connected(first), 1)
second = import_again()
flight.land()
""")


def test_commands_of_both_imports_are_in_flight_at_once(runs: Runs) -> None:
    runs("""
flight = Flight(first, connected(first), 1)
second = import_again()
other = Flight(second, connected(second), 2)
third = Flight(first, connected(first), 3)
other.land()
flight.land()
third.land()
""")


def test_what_libnbd_holds_for_the_first_import_is_kept(nbdkit: StartServer, runs: Runs) -> None:
    # The server answers no read, which stays in flight until its handle is closed.
    program = """
class Completion:
    def __call__(self, error):
        return 1

class Room(bytearray):
    pass

g = first.NBD()
g.connect_unix(sys.argv[2])
completion, room = Completion(), Room(4096)
held = [weakref.ref(completion), weakref.ref(room)]
g.aio_pread(room, 0, completion)
del completion, room
second = import_again()
exercise(second, connected(second))
collect()
assert all(reference() is not None for reference in held)
g.close()
collect()
assert all(reference() is None for reference in held)
"""
    runs(program, nbdkit("memory", "1M", "--filter=delay", "rdelay=600").socket)


def test_an_exception_of_a_callback_in_flight_reaches_the_hook(runs: Runs) -> None:
    runs("""
h = connected(first)
mine = ValueError("mine")
def fail(error):
    raise mine
h.aio_flush(fail)
second = import_again()
g = connected(second)
exercise(second, g)
assert unraisable == []
drain(h)
collect()
assert unraisable == [mine], unraisable
""")


def test_a_callback_uses_a_handle_of_the_other_import(runs: Runs) -> None:
    runs("""
h = connected(first)
second = import_again()
g = connected(second)
g.pwrite(b"g" * 512, 0)
read = []
h.block_status(MIB, 0, lambda *extent: read.append(g.pread(512, 0)))
g.block_status(MIB, 0, lambda *extent: read.append(h.pread(512, 0)))
assert read == [b"g" * 512] * 2
inner = []
def deeper(*extent):
    inner.append(failure(h.block_status, MIB, 0, lambda *extent: 0))
    g.block_status(MIB, 0, deepest)
def deepest(*extent):
    inner.append(failure(h.pread, 512, 0))
h.block_status(MIB, 0, deeper)
assert [raised.errnum for raised in inner] == [errno.EDEADLK] * 2, inner
""")


def test_a_buffer_of_the_other_import_is_used_or_refused(runs: Runs) -> None:
    runs("""
buffer = first.Buffer(512)
second = import_again()
g = connected(second)
g.pwrite(b"x" * 512, 0)
try:
    g.aio_pread(buffer, 0, lambda error: 1)
except TypeError:
    pass
else:
    drain(g)
    assert buffer[:] == b"x" * 512
exercise(second, g)
""")


def test_ten_imports_work_side_by_side(runs: Runs) -> None:
    runs("""
modules = [first]
flights = []
for number in range(1, 10):
    flights.append(Flight(modules[-1], connected(modules[-1]), number))
    modules.append(import_again())
for flight in flights:
    flight.land()
for module in modules:
    exercise(module, connected(module))
""")


def test_the_package_is_reloaded(runs: Runs) -> None:
    runs("""
h = connected(first)
flight = Flight(first, connected(first), 1)
assert importlib.reload(first) is first
exercise(first, h)
flight.land()
exercise(first, connected(first))
""")


def test_one_module_of_the_package_is_imported_again(runs: Runs) -> None:
    runs("""
h = connected(first)
for name in sorted(set(modules_of_nbd()) - {"nbd"}):
    flight = Flight(first, connected(first), 1)
    del sys.modules[name]
    importlib.import_module(name)
    latest = importlib.import_module("nbd")
    flight.land()
    exercise(first, h)
    exercise(latest, connected(latest))
""")


def test_the_package_alone_is_imported_again(runs: Runs) -> None:
    runs("""
h = connected(first)
flight = Flight(first, connected(first), 1)
del sys.modules["nbd"]
import nbd as second
assert second is not first
flight.land()
exercise(first, h)
exercise(second, connected(second))
""")


def test_another_thread_imports_it_again_while_commands_run(runs: Runs) -> None:
    runs("""
sys.setswitchinterval(1e-5)
modules, failures = [], []

def keep_importing():
    try:
        for _ in range(5):
            modules.append(import_again())
    except BaseException as raised:
        failures.append(raised)

h = connected(first)
thread = threading.Thread(target=keep_importing)
thread.start()
while thread.is_alive():
    Flight(first, h, 1).land()
thread.join()
assert failures == [] and len(modules) == 5, failures
for module in [first, *modules]:
    exercise(module, connected(module))
""")


def test_threads_import_it_at_the_same_time(runs: Runs) -> None:
    runs("""
sys.setswitchinterval(1e-5)
flight = Flight(first, connected(first), 1)
for name in names():
    del sys.modules[name]
start = threading.Barrier(4)
modules, failures = [], []

def import_it():
    try:
        start.wait(20)
        module = importlib.import_module("nbd")
        modules.append(module)
        for mark in range(3):
            Flight(module, connected(module), 7).land()
    except BaseException as raised:
        failures.append(raised)

threads = [threading.Thread(target=import_it) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert failures == [] and len(modules) == 4, failures
flight.land()
exercise(first, connected(first))
""")


def test_an_import_that_is_no_longer_referenced_is_released(runs: Runs) -> None:
    runs("""
h = connected(first)
flight = Flight(first, h, 1)
for _ in range(5):
    module = import_again()
    g = connected(module)
    dropped = Flight(module, g, 7)
    del module, g, dropped
    for name in names():
        del sys.modules[name]
    collect()
flight.land()
exercise(first, h)
""")


def test_a_handle_outlives_the_module_it_was_made_by(runs: Runs) -> None:
    runs("""
flight = Flight(first, connected(first), 1)
del first
second = import_again()
collect()
g = connected(second)
exercise(second, g)
flight.land()
del flight
collect()
exercise(second, g)
""")


def test_the_program_ends_with_handles_of_both_imports_open(runs: Runs) -> None:
    runs("""
flights = [Flight(first, connected(first), 1)]
second = import_again()
flights.append(Flight(second, connected(second), 2))
""")


def test_the_program_ends_while_threads_wait_in_calls_of_both_imports(runs: Runs) -> None:
    runs("""
def wait(module, started):
    h = connected(module)
    h.aio_pread(bytearray(512), 0, lambda error: started.set() or 1)
    while True:
        h.poll(-1)

second = import_again()
for module in first, second:
    started = threading.Event()
    threading.Thread(target=wait, args=(module, started), daemon=True).start()
    assert started.wait(20)
""")


def test_handles_of_both_imports_are_closed_when_the_program_ends(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M", "--filter=exitlast")
    run_silently(PROGRAM + "h = connected(first); g = connected(import_again())", server.socket)
    assert server.wait() == 0
