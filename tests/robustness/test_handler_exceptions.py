"""A call raises exactly the exception that a signal handler raised, wherever it did so."""

from __future__ import annotations

import functools
import gc
import itertools
import signal
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from support.figures import Figure, pass_on
from support.forms import SOAK
from support.injection import EVENT, Injector
from support.programs import output_of
from support.servers import StartServer
from support.signals import Stop, handling, stop
from support.sizes import MIB
from support.usage import registered

import nbd


def catch_all(*args: Any) -> None:
    raise Stop


def once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Stop


def indirect(number: int, frame: Any) -> None:
    stop(number, None)


class Handler:
    """Handlers that are not functions."""

    def method(self, number: int, frame: Any) -> None:
        raise Stop

    def __call__(self, number: int, frame: Any) -> None:
        raise Stop


def forgetful(number: int, frame: Any) -> None:
    while frame is not None:
        frame = frame.f_back
    raise Stop


HANDLERS: dict[str, Any] = {
    "function": stop,
    "forgetful": forgetful,
    "any arguments": catch_all,
    "only once": once,
    "indirect": indirect,
    "method": Handler().method,
    "object": Handler(),
    "partial": functools.partial(stop),
    "generator": lambda *args: next(raising()),
}


def raising() -> Iterator[None]:
    catch_all()
    yield


@pytest.fixture(autouse=True)
def nothing_is_printed(unraisable: list[Any], capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Assert that no exception was only printed."""
    yield
    assert unraisable == []
    assert "Stop" not in capfd.readouterr().err


@pytest.fixture(params=list(HANDLERS.values()), ids=list(HANDLERS))
def handler(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Install one of the handlers."""
    with handling(request.param, signal.SIGUSR1):
        yield request.param


def interrupted(*_: Any) -> int:
    """Callback that a signal interrupts."""
    signal.raise_signal(signal.SIGUSR1)
    return 0


@pytest.mark.usefixtures("handler")
def test_in_a_callback_of_a_call_that_fails_by_it(disk: nbd.NBD) -> None:
    with pytest.raises(Stop):
        disk.block_status(MIB, 0, interrupted)
    assert disk.pread(512, 0) == bytes(512)
    assert registered() == 0


def drive(h: nbd.NBD) -> None:
    """Run all commands to their end."""
    while h.aio_in_flight():
        h.poll(-1)


@pytest.mark.usefixtures("handler")
def test_in_a_callback_of_a_call_that_does_not_fail(disk: nbd.NBD) -> None:
    disk.aio_pread(nbd.Buffer(512), 0, interrupted)
    with pytest.raises(Stop):
        drive(disk)
    assert disk.pread(512, 0) == bytes(512)


@pytest.mark.usefixtures("handler")
def test_in_a_callback_of_the_debug_log(disk: nbd.NBD) -> None:
    first = iter([interrupted])
    disk.set_debug_callback(lambda *message: next(first, lambda: 0)())
    with pytest.raises(Stop):
        disk.set_debug(True)
    disk.set_debug(False)
    disk.clear_debug_callback()
    assert disk.pread(512, 0) == bytes(512)


def waiting_calls(h: nbd.NBD) -> list[Callable[[], object]]:
    """Return a list of functions, of which each line of the handle's debug log calls one."""
    waiting: list[Callable[[], object]] = []
    h.set_debug_callback(lambda *message: waiting.pop()() if waiting else 0)
    h.set_debug(True)
    return waiting


@pytest.mark.usefixtures("handler")
def test_in_a_callback_that_the_end_of_a_with_statement_runs(disk: nbd.NBD) -> None:
    def leave() -> None:
        with disk:
            waiting.append(interrupted)

    waiting = waiting_calls(disk)
    with pytest.raises(Stop):
        leave()
    assert registered() == 0


@pytest.mark.usefixtures("handler")
def test_in_a_callback_that_a_dropped_handle_runs(nbdkit: StartServer) -> None:
    def drop() -> None:
        handles.clear()
        for _ in range(3):
            gc.collect()
        nbd.NBD().get_handle_name()  # raises what a destructor could not

    handles = [nbd.connect(nbdkit("memory", "1M").uri)]
    waiting_calls(handles[0]).append(interrupted)
    with pytest.raises(Stop):
        drop()
    nbd.NBD().get_handle_name()


def test_what_a_callback_raises_itself_is_still_the_cause(disk: nbd.NBD) -> None:
    def extent(*_: Any) -> int:
        stop(1, None)
        return 0

    with pytest.raises(nbd.Error) as caught:
        disk.block_status(MIB, 0, extent)
    assert isinstance(caught.value.__cause__, Stop)


class StopAt(Injector):
    """An Injector that raises an Exception instead of a KeyboardInterrupt."""

    def step(self, frame: Any, event: str, argument: object) -> Any:
        """Count a place, and raise if it is the chosen one."""
        if event == EVENT:
            self.left -= 1
            if self.left == 0:
                self.raised = True
                raise Stop
        return self.step


def at_every_place(function: Callable[[], object]) -> int:
    """Call a function once for each place; it always raises the injected exception itself."""
    for place in itertools.count(1):
        injector = StopAt(place)
        error = injector.run(function)
        assert injector.raised == (type(error) is Stop), (place, error)
        error = None
        if not injector.raised:
            return place - 1
    raise AssertionError


def status(h: nbd.NBD, context: str, offset: int, entries: list[int], error: Any) -> None:
    """Read the arguments."""
    assert (context, offset, error.value) == (nbd.CONTEXT_BASE_ALLOCATION, 0, 0)


CALLS: dict[str, Callable[[nbd.NBD], object]] = {
    "extents": lambda h: list(nbd.extents(h)),
    "block_status": lambda h: h.block_status(MIB, 0, functools.partial(status, h)),
    "pread_structured": lambda h: h.pread_structured(512, 0, lambda *chunk: 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_at_every_bytecode(nbdkit: StartServer, figure: Figure, name: str) -> None:
    for _ in range(3):
        gc.collect()  # an exception in a finalizer is lost
    with nbd.connect(nbdkit("memory", "1M").uri) as h:
        places = at_every_place(lambda: CALLS[name](h))
        assert registered() == 0
    figure(f"injection of an Exception: places in {name}", places)


STORM = """
import nbd, os, random, signal, sys, time

class Stop(Exception):
    pass

made = came = calls = 0
armed = False

def handler(number, frame):
    global made, armed
    if not armed:
        return
    while frame is not None:  # cffi drops an exception in its `onerror`, and so does a destructor
        if frame.f_code.co_name.startswith(("_keep", "__del__", "_gone")):
            return
        frame = frame.f_back
    armed = False
    made += 1
    raise Stop

def unraisable(told):
    # PyPy runs the callbacks of importlib's weak references at any time, in the handler's reach.
    if "_get_module_lock" not in repr(told.object):
        print("unraisable", told.exc_value, told.object)

sys.unraisablehook = unraisable
signal.signal(signal.SIGALRM, handler)
h = nbd.connect(sys.argv[1])
for at in range(0, 1 << 20, 1 << 16):
    h.pwrite(b"data", at)
list(nbd.extents(h))  # loads the modules
end = time.monotonic() + float(sys.argv[2])
chance = random.Random(1)
while time.monotonic() < end:
    calls += 1
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, chance.random() * 0.001 + 1e-6)
        if calls % 2:
            extents = list(nbd.extents(h))
            assert len(extents) == 32
        else:
            h.block_status(1 << 20, 0, lambda *extents: 0)
        armed = False
    except Stop:
        came += 1
while True:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        h.get_size()
        break
    except Stop:
        came += 1
lost = made - came
# PyPy calls finalizers and callbacks of weak references at any time, and loses their exceptions.
assert 0 <= lost <= (made // 100 + 1 if sys.implementation.name == "pypy" else 0), (made, came)
while nbd._binding.shim.lib.nbdshim_orphans(h._h):  # an abandoned command is kept until its reply
    h.poll(-1)
assert not nbd._binding.callbacks.registry, nbd._binding.callbacks.registry
print(f"storm of Exceptions, calls: {calls}")
print(f"storm of Exceptions, those that came out as they are: {came}")
"""


def test_in_a_storm_of_signals(nbdkit: StartServer, figure: Figure) -> None:
    printed = output_of(STORM, nbdkit("memory", "1M").uri, "30" if SOAK else "2")
    assert "unraisable" not in printed
    pass_on(printed, figure)
