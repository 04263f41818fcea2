"""Any argument, in any state of the handle: a value or a documented exception, never a crash.

hypothesis generates the calls. They run in a separate process, which runs this file as a program,
so that a signal or a hang fails one test instead of ending all of them. Calls that wait or affect
the machine by design are left out: infinite timeouts, commands with side effects, other hosts, and
descriptors that do not belong to the test.
"""

from __future__ import annotations

import gc
import inspect
import os
import reprlib
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.figures import Figure, pass_on, show
from support.forms import SOAK
from support.programs import finds_support
from support.servers import StartServer

import nbd

pytest.importorskip("hypothesis", reason="the calls are made up by hypothesis")

import hypothesis
from hypothesis import strategies as st

CALLS = 100_000 if SOAK else 5_000
AT_ONCE = 8  # calls on one handle
HANG = 60  # seconds until the calls on one handle are considered to hang
SOCKET = "socket"  # of a working server, in the current directory
STATES = "created", "opt mode", "connected", "shut down", "dead", "closed"
BUFFER = "buffer"  # not a state of a handle: stands for the methods of nbd.Buffer

DOCUMENTED = (
    nbd.Error,
    nbd.ClosedHandle,
    TypeError,
    ValueError,
    OverflowError,
    BufferError,
    MemoryError,
)
VALUES = (type(None), bool, int, str, bytearray, memoryview, nbd.Buffer)


class CallbackFailed(Exception):
    """The exception that callbacks raise."""


class NoInteger(Exception):
    """The exception that OddIndex raises."""


class OddIndex:
    """An object whose __index__ raises."""

    def __index__(self) -> int:
        """Raise."""
        raise NoInteger


def raise_it(*args: object) -> None:
    """Callback that raises."""
    raise CallbackFailed


def take_nothing() -> None:
    """Callback that cannot be called with a callback's arguments."""


def fail_it(*args: Any) -> int:
    """Callback that sets an error."""
    args[-1].value = 28
    return -1


# --- what to pass -----------------------------------------------------------------------------


def around(*values: int) -> list[int]:
    """Return integers and their neighbours."""
    return [near for value in values for near in (value - 1, value, value + 1)]


sockets: dict[int, int] = {}  # descriptors that were passed, and the inodes behind them


def fresh_socket() -> int:
    """Return a socket whose other end is closed; the handle may close it."""
    ours, other = socket.socketpair()
    other.close()
    sockets[ours.fileno()] = os.fstat(ours.fileno()).st_ino
    return ours.detach()


def close_sockets() -> None:
    """Close those sockets that no handle took over."""
    for descriptor, inode in sockets.items():
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                os.close(descriptor)
    sockets.clear()


def released_view() -> memoryview:
    """Return a memoryview that was released."""
    view = memoryview(bytearray(512))
    view.release()
    return view


extremes = st.sampled_from(
    around(0, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 1 << 70, -(1 << 31), -(1 << 63))
)
texts = st.text(max_size=8) | st.sampled_from(["", "a\0b", "\udcff", "\ud800", "x" * 5000])
not_integers = st.one_of(
    st.none(),
    st.floats(),
    st.binary(max_size=8),
    st.lists(st.none() | st.integers() | st.binary(max_size=3), max_size=3),
    st.dictionaries(st.integers(), st.none(), max_size=2),
    st.builds(object),
    st.builds(OddIndex),
    st.just(len),
    st.just(nbd.NBD),
)
anything = not_integers | st.booleans() | extremes | texts

buffers = st.one_of(
    st.binary(max_size=1024),
    st.builds(bytearray, st.sampled_from([0, 1, 512, 4096])),
    st.builds(nbd.Buffer, st.sampled_from([0, 1, 512, 4096])),
    st.builds(released_view),
    st.just(memoryview(bytes(1024))[::2]),
    st.just(memoryview(bytes(1024))),
    st.builds(lambda: memoryview(bytearray(1024))[256:768]),
    st.builds(lambda: memoryview(bytearray(512)).cast("Q")),
)
some_callbacks: list[Callable[..., object]] = [
    lambda *args: None,
    lambda *args: 1,
    lambda *args: "no int",
    take_nothing,
    raise_it,
    fail_it,
]
callbacks = st.sampled_from(some_callbacks)
names = texts | st.sampled_from(["base:allocation", "base:", "qemu:dirty-bitmap:x", "default"])
counts = st.sampled_from([0, 1, 511, 512, 4096, 1 << 20, (1 << 26) + 1]) | st.sampled_from(
    [*around(1 << 48, 1 << 63, 1 << 64), -1, -(1 << 31), -(1 << 63)]
)
offsets = st.sampled_from([0, 1, 512, (1 << 20) - 512, 1 << 20]) | extremes
switches = st.booleans() | st.integers(0, 3) | extremes
numbers = st.integers(-1, 8) | extremes
commands = st.sampled_from(
    [
        ["nbdkit", "--single", "--exit-with-parent", "null", "1M"],
        ["true"],
        ["false"],
        ["nbdkit-does-not-exist"],
        ["true\0"],
        [""],
        [],
    ]
)
uris = st.sampled_from(
    [
        f"nbd+unix:///?socket={SOCKET}",
        f"nbds+unix:///?socket={SOCKET}",
        "nbd://127.0.0.1:1/",
        "nbd://[::1]:1/\udcff",
        "nbds://127.0.0.1:1/?tls-psk-file=/nonexistent",
        "nbd+unix:///?socket=/nonexistent/socket",
        "nbds+unix:///?tls-certificates=/nonexistent&socket=/nonexistent/socket",
        "nbd+unix:///",
        "nbd:",
        "http://127.0.0.1:1/",
        "not a URI",
        "",
        "a\0b",
    ]
)
addresses = st.sampled_from(
    [
        ("127.0.0.1", 1),
        ("::1", 1),
        ("::1", 1, 1 << 32, -1),
        ("127.0.0.1", 1 << 16),
        ("127.0.0.1", "1"),
        (1, "127.0.0.1"),
        (),
        SOCKET,
        "/nonexistent/socket",
        b"\0abstract",
        "x" * 200,
    ]
)

# By the name of the parameter, or by method and parameter.  The others get arbitrary values.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "addr": addresses,
    "allow": switches,
    "argv": commands,
    "buf": buffers,
    "chunk": callbacks,
    "cid": st.sampled_from([*around(1 << 32), -1]),
    "completion": callbacks | st.none(),
    "connect_vsock.port": st.sampled_from([0, 1, *around(1 << 32), -1]),
    "aio_connect_vsock.port": st.sampled_from([0, 1, *around(1 << 32), -1]),
    "context": callbacks,
    "contexts": st.lists(names, max_size=3),
    "cookie": numbers,
    "count": counts,
    "debug": callbacks | switches,
    "enable": switches,
    "extent": callbacks,
    "extent64": callbacks,
    "fd": st.just(-1) | st.integers(1 << 30, (1 << 31) + 1),
    "flags": st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 65536]) | extremes,
    "hostname": st.sampled_from(["127.0.0.1", "::1", "127.0.0.1\0"]),
    "i": numbers,
    "list": callbacks,
    "mask": numbers,
    "metacontext": names,
    "name": names,
    "offset": offsets,
    "port": st.sampled_from(["1", "0", "65536", "-1", "no port", ""]),
    "private_data": extremes,
    "queries": st.lists(names, max_size=3),
    "request": switches,
    "signum": numbers,
    "size_type": numbers,
    "sock": st.builds(fresh_socket) | st.sampled_from([-1, 1 << 30, 1 << 31, 1 << 40, -(1 << 31)]),
    "timeout": st.integers(0, 2) | st.sampled_from([1 << 31, 1 << 40, -(1 << 31) - 1, -(1 << 40)]),
    "tls": numbers,
    "unixsocket": texts | st.sampled_from([SOCKET, SOCKET.encode(), Path("/nonexistent/socket")]),
    "uri": uris,
    "verify": switches,
}
# An arbitrary integer or string would wait for ever here, or affect other processes.
DELICATE = {"argv", "addr", "cid", "fd", "hostname", "port", "sock", "timeout", "uri"}

Call = tuple[str, list[Any], dict[str, Any]]


@cache
def argument(name: str) -> st.SearchStrategy[Any]:
    """Return a value to pass for a parameter, mostly a meaningful one."""
    likely = LIKELY.get(name, texts)
    wrong = not_integers if name.rpartition(".")[2] in DELICATE else anything
    # Not one_of: it flattens the two strategies, and would choose each part equally often.
    return st.sampled_from([likely, likely, likely, likely, wrong]).flatmap(lambda chosen: chosen)


def calls_of(owner: type, method: str) -> st.SearchStrategy[Call]:
    """Return calls of a method: positional, by keyword, and with too few or too many arguments."""
    parameters = list(inspect.signature(getattr(owner, method)).parameters.values())
    if parameters and parameters[0].name == "self":
        del parameters[0]
    given = {
        one.name: argument(full if (full := f"{method}.{one.name}") in LIKELY else one.name)
        for one in parameters
    }
    needed = {one.name: given[one.name] for one in parameters if one.default is one.empty}
    by_position = st.tuples(*given.values()).map(list)
    none: st.SearchStrategy[dict[str, Any]] = st.just({})
    ways = [
        st.tuples(st.just(method), by_position, none),
        st.tuples(st.just(method), st.tuples(*needed.values()).map(list), none),
        st.tuples(st.just(method), st.just([]), st.fixed_dictionaries(given)),
    ]
    odd = [
        st.tuples(st.just(method), by_position.map(lambda args: args[:-1]), none),
        st.tuples(st.just(method), by_position.map(lambda args: [*args, None]), none),
        st.tuples(st.just(method), by_position, st.just({"no_such_argument": 1})),
    ]
    return st.sampled_from([*ways, *ways, *ways, *odd]).flatmap(lambda chosen: chosen)


def methods_of(owner: type) -> list[str]:
    """Return the names of the public methods."""
    return [name for name in dir(owner) if name[0] != "_" and callable(getattr(owner, name))]


def sequences(state: str) -> st.SearchStrategy[tuple[str, list[Call]]]:
    """Return a state, and the calls to make in it."""
    owner = nbd.Buffer if state == BUFFER else nbd.NBD
    calls = st.one_of([calls_of(owner, method) for method in methods_of(owner)])
    return st.tuples(st.just(state), st.lists(calls, min_size=AT_ONCE, max_size=AT_ONCE))


# --- the program ------------------------------------------------------------------------------


def target_in(state: str) -> Any:
    """Return a handle in a state, or a buffer."""
    if state == BUFFER:
        return nbd.Buffer(512)
    h = nbd.NBD()
    if state == "opt mode":
        h.set_opt_mode(True)
    if state in ("opt mode", "connected", "shut down"):
        h.connect_unix(SOCKET)
    if state == "shut down":
        h.shutdown()
    if state == "dead":
        with pytest.raises(nbd.Error):
            h.connect_socket(fresh_socket())
    if state == "closed":
        h.close()
    return h


class Caller:
    """Makes calls, checks the outcome of each, and records in a file which one is running."""

    def __init__(self, log: Path) -> None:
        """Record the running call in this file."""
        self.returned: Counter[str] = Counter()
        self.raised: Counter[str] = Counter()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)

    def record(self, text: str) -> None:
        """Replace the content of the file."""
        os.ftruncate(self._log, 0)
        os.pwrite(self._log, text.encode(errors="backslashreplace"), 0)

    def call(self, state: str, target: object, call: Call) -> None:
        """Make a call on a target that was in this state before the first call."""
        method, args, options = call
        self.record(f"{state}: {method}(*{reprlib.repr(args)}, **{reprlib.repr(options)})")
        try:
            value = getattr(target, method)(*args, **options)
        except (*DOCUMENTED, NoInteger):
            self.raised[state] += 1
        except IndexError:
            assert state == BUFFER
            self.raised[state] += 1
        else:
            assert isinstance(value, VALUES), f"{method} returned {value!r}"
            assert state != "closed", f"{call} on a closed handle"
            self.returned[state] += 1


def would_wait(target: Any, method: str) -> bool:
    """Return whether libnbd expects a reply after the call, and would wait for it."""
    with suppress(nbd.ClosedHandle):
        return method == "aio_notify_read" and bool(target.aio_is_ready())
    return False


def notice(unraisable: Any) -> None:
    """sys.unraisablehook: accepts what callbacks raise; anything else is a failure."""
    ours = CallbackFailed, IndexError, AttributeError
    if not isinstance(unraisable.exc_value, (*DOCUMENTED, *ours)):
        sys.__unraisablehook__(unraisable)
        os._exit(3)


def close(target: Any) -> None:
    """Close a handle unless a call has closed it."""
    if isinstance(target, nbd.NBD):
        with suppress(nbd.ClosedHandle):
            target.close()


def program(log: Path, wanted: int, seed: int) -> None:
    """Make the given number of calls, and print the figures."""
    caller = Caller(log)
    sys.unraisablehook = notice

    def run(example: tuple[str, list[Call]]) -> None:
        signal.alarm(HANG)  # SIGALRM ends the process; libnbd would keep waiting after SIGINT
        state, calls = example
        target = target_in(state)
        for call in calls:
            if not would_wait(target, call[0]):
                caller.call(state, target, call)
        caller.record(f"{state}: close()")
        close(target)
        close_sockets()

    given = hypothesis.given(st.one_of([sequences(state) for state in (*STATES, BUFFER)]))
    while (missing := wanted - sum((caller.returned + caller.raised).values())) > 0:
        quiet = hypothesis.settings(
            max_examples=missing // AT_ONCE + 1,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(seed)(quiet(given(run)))()
        seed += 1
    gc.collect()
    for state in (*STATES, BUFFER):
        returned, raised = caller.returned[state], caller.raised[state]
        show(f"bad arguments, {state}: calls", returned + raised)
        show(f"bad arguments, {state}: calls that raised as documented", raised)


# --- the tests --------------------------------------------------------------------------------


def how_it_ended(status: int) -> str:
    """Return the meaning of an exit status."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def test_any_argument_in_any_state_gets_a_documented_answer(
    nbdkit: StartServer, tmp_path: Path, figure: Figure
) -> None:
    (tmp_path / SOCKET).symlink_to(nbdkit("memory", "1M").socket)
    log, errors = tmp_path / "call", tmp_path / "stderr"
    seed = int.from_bytes(os.urandom(4), "big") if SOAK else 0
    for options in (["-X", "faulthandler"], ["--jit", "off"]):
        with errors.open("w") as stderr:
            done = subprocess.run(
                [sys.executable, *options, __file__, log, str(CALLS), str(seed)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                timeout=300 + CALLS // 50,
                cwd=tmp_path,
                env=finds_support(),
            )
        said = errors.read_text(errors="replace")[-5000:]
        # The JIT of trixie's PyPy 3.11 can abort by itself, seen in hypothesis's own code.
        if "rpython_jit_metainterp" not in said:
            break
    pass_on(done.stdout, figure)
    if done.returncode != 0:
        how = how_it_ended(done.returncode)
        pytest.fail(f"{how} with seed {seed} in {log.read_text()}\n{said}", pytrace=False)


if __name__ == "__main__":
    program(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
