"""Subclasses of int, str, bytes and list that lie never expose foreign memory."""

from __future__ import annotations

from typing import Any

import pytest
from support.programs import output_of
from support.servers import StartServer
from support.usage import registered
from test_exceptions_at_every_bytecode import BLOCK, COMMANDS, OLD, arguments, takes, use_blocks

import nbd

# Each call is made with honest and with lying numbers of the same value, with the same result.
PROGRAM = """
import sys, warnings
import nbd

warnings.simplefilter("ignore", DeprecationWarning)  # __index__ returned a subclass
HUGE = 1 << 40

class Honest(int):
    pass

class Low(int):  # less than whatever it is compared with
    __lt__ = __le__ = lambda self, other: True
    __gt__ = __ge__ = __eq__ = lambda self, other: False
    __hash__ = int.__hash__

class High(int):
    __lt__ = __le__ = __eq__ = lambda self, other: False
    __gt__ = __ge__ = lambda self, other: True
    __hash__ = int.__hash__

class Equal(int):
    __lt__ = __gt__ = __ne__ = lambda self, other: False
    __le__ = __ge__ = __eq__ = lambda self, other: True
    __hash__ = int.__hash__

class Converted(int):
    __index__ = __int__ = __trunc__ = __abs__ = lambda self: HUGE
    __bool__ = lambda self: not int(self)
    __str__ = __repr__ = lambda self: "0"

class Added(int):
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = lambda self, other: 0
    __neg__ = __floordiv__ = __rshift__ = __and__ = __rand__ = lambda self, other=0: 0

class Raising(int):
    def fail(self, *others):
        raise AssertionError("a method of a number was called")
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = fail
    __add__ = __radd__ = __sub__ = __rsub__ = __index__ = __int__ = __bool__ = fail

class Wrapped:  # not an int, but its __index__ returns one that lies
    def __init__(self, value):
        self.value = Low(value)
    def __index__(self):
        return self.value

class Changing:  # a different number each time
    def __init__(self, value):
        self.values = [value]
    def __index__(self):
        return self.values.pop() if self.values else HUGE

made = globals()[sys.argv[1]]
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_unix(sys.argv[2])
h.pwrite(bytes(range(256)) * 8, 0)
shared = bytearray(range(256)) * 4
buffer = nbd.Buffer.from_bytearray(shared)
buffer.to_buffer()
own = nbd.Buffer(1024)
own[700] = 7

def command(cookie):
    while not h.aio_command_completed(cookie):
        h.poll(-1)

def structured(n, count, offset):
    chunks = []
    result = h.pread_structured(n(count), n(offset), lambda s, o, *r: chunks.append((len(s), o)))
    return bytes(result), sorted(chunks)

def read(n, into, offset):
    command(h.aio_pread(into, n(offset)))
    return bytes(into)

def status(n, count, offset):
    extents = []
    h.block_status(n(count), n(offset), lambda *extent: extents.append(extent[:3]) or 0)
    return extents

CALLS = {
    f"{text}({first}, {second})": (call, first, second)
    for text, call in {
        "is_zero": lambda n, a, b: own.is_zero(n(a), n(b)),
        "is_zero, shared": lambda n, a, b: nbd.Buffer.from_buffer(shared).is_zero(n(a), n(b)),
        "pread": lambda n, a, b: bytes(h.pread(n(b), n(a))),
        "pread_structured": lambda n, a, b: structured(n, b, a),
        "aio_pread": lambda n, a, b: read(n, nbd.Buffer(512), a),
        "aio_pread, bytearray": lambda n, a, b: read(n, bytearray(512), a),
        "aio_pwrite": lambda n, a, b: command(h.aio_pwrite(bytes(512), n(a), flags=n(b))),
        "block_status": lambda n, a, b: status(n, b, a),
        "zero": lambda n, a, b: h.zero(n(b), n(a), n(0)),
        "item": lambda n, a, b: own[n(a)],
        "slice": lambda n, a, b: own[n(a):n(b)],
        "set": lambda n, a, b: own.__setitem__(n(a), n(b)),
        "Buffer": lambda n, a, b: nbd.Buffer(n(b % 8192)).size(),
        "set_handshake_flags": lambda n, a, b: h.set_handshake_flags(n(a)),
        "poll": lambda n, a, b: h.poll(n(min(max(a, 0), 1))),
    }.items()
    for first in (0, 512, 1023, 1024, 1025, -1, HUGE, -HUGE, 1 << 70)
    for second in (512, 0, 1, -1, 1025, HUGE, -HUGE, 1 << 70)
}

def outcome(call, number, first, second):
    own[700] = 7
    try:
        return call(number, first, second)
    except (nbd.Error, IndexError, OverflowError, ValueError, TypeError, MemoryError) as error:
        return type(error)

for text, (call, first, second) in CALLS.items():
    honest, lying = outcome(call, int, first, second), outcome(call, made, first, second)
    assert honest == lying, (text, honest, lying)
print(len(CALLS), len(nbd._binding.callbacks.registry))
"""


@pytest.mark.parametrize(
    "kind",
    ["Honest", "Low", "High", "Equal", "Converted", "Added", "Raising", "Wrapped", "Changing"],
)
def test_a_number_that_lies_has_its_true_value(nbdkit: StartServer, kind: str) -> None:
    printed = output_of(PROGRAM, kind, nbdkit("memory", "1M").socket)
    calls, left = printed.split()
    assert int(calls) > 1000
    assert left == "0"


class Failing:
    """A number whose conversion raises an exception of its own."""

    def __index__(self) -> int:
        raise RuntimeError("no number today")


class Looking:
    """A number whose conversion reads a buffer."""

    def __init__(self, buffer: nbd.Buffer) -> None:
        self.buffer = buffer
        self.seen = b""

    def __index__(self) -> int:
        self.seen += bytes(self.buffer)
        return 0


@pytest.fixture
def connected(h: nbd.NBD, nbdkit: StartServer) -> nbd.NBD:
    """Return a handle that is connected to a disk of 1 MiB."""
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(nbdkit("memory", "1M").socket)
    return h


NUMBERS = [
    (name, number)
    for name in COMMANDS
    for number in takes(name)
    if number in ("count", "offset", "flags")
]


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_a_number_that_fails_leaves_nothing_behind(
    connected: nbd.NBD, name: str, number: str
) -> None:
    use_blocks()
    buffer = nbd.Buffer(BLOCK)
    given = arguments(name, lambda *arguments: 0, buffer)
    given[number] = Failing()
    with pytest.raises(RuntimeError, match="no number today"):
        getattr(connected, name)(**given)
    assert registered() == 0
    assert connected.aio_in_flight() == 0
    assert OLD not in bytes(buffer)


@pytest.mark.parametrize(("name", "number"), [n for n in NUMBERS if "buf" in takes(n[0])])
def test_a_number_that_looks_at_the_buffer_sees_no_old_byte(
    connected: nbd.NBD, name: str, number: str
) -> None:
    use_blocks()
    buffer = nbd.Buffer(BLOCK)
    looking = Looking(buffer)
    given = arguments(name, lambda *arguments: 1, buffer)
    given[number] = looking
    getattr(connected, name)(**given)
    assert looking.seen == bytes(BLOCK)
    while connected.aio_in_flight():
        connected.poll(1000)
    assert OLD not in bytes(buffer)


class Name(str):
    """A string that claims to be another string."""

    def __len__(self) -> int:
        return 1 << 40

    def encode(self, *arguments: Any, **options: Any) -> bytes:
        """Return bytes with a NUL, which C must not see."""
        return b"a\0b"

    def __contains__(self, part: object) -> bool:
        return False

    def __str__(self) -> str:
        return "other"


class Bytes(bytes):
    """Bytes that claim to be longer."""

    def __len__(self) -> int:
        return 1 << 30

    def __contains__(self, part: object) -> bool:
        return False


class Names(list):  # type: ignore[type-arg]
    """A list that claims to be longer, and changes while it is read."""

    def __len__(self) -> int:
        return 1 << 30

    def __iter__(self) -> Any:
        yield "x-from-iter:"
        self.clear()
        yield "y-from-iter:"


class Array(bytearray):
    """A bytearray that claims to be longer."""

    def __len__(self) -> int:
        return 1 << 30


def test_a_string_that_lies_has_its_true_value(h: nbd.NBD) -> None:
    h.set_handle_name(Name("real"))
    assert h.get_handle_name() == "real"
    h.set_export_name(Name("x"))
    assert h.get_export_name() == "x"


def test_a_string_that_hides_a_nul_is_refused(h: nbd.NBD) -> None:
    with pytest.raises(ValueError, match="NUL"):
        h.set_handle_name(Name("a\0b"))


@pytest.mark.needs("opt_list_meta_context_queries")
def test_a_list_that_lies_gives_what_its_iterator_gives(h: Any, nbdkit: StartServer) -> None:
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M").socket)
    listed: list[str] = []
    query = Names([nbd.CONTEXT_BASE_ALLOCATION])
    h.opt_list_meta_context_queries(query, lambda name: listed.append(name))
    assert listed == []


def test_bytes_that_lie_are_written_as_they_are(connected: nbd.NBD) -> None:
    connected.pwrite(b"\2" * 1024, 0)
    connected.pwrite(Bytes(b"\1" * 512), 0)
    assert connected.pread(1024, 0) == b"\1" * 512 + b"\2" * 512


def test_a_bytearray_that_lies_is_read_into_as_it_is(connected: nbd.NBD) -> None:
    connected.pwrite(b"\1" * 1024, 0)
    array = Array(512)
    cookie = connected.aio_pread(array, 0)
    while not connected.aio_command_completed(cookie):
        connected.poll(1000)
    assert bytes(memoryview(array)) == b"\1" * 512


def test_a_bytearray_that_lies_is_shared_as_it_is() -> None:
    shared = nbd.Buffer.from_buffer(Array(512))
    assert shared.is_zero(0, 512)
    with pytest.raises(IndexError):
        shared.is_zero(0, 513)
