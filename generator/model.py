# SPDX-License-Identifier: LGPL-2.0-or-later
"""The model: the contents of libnbd.h as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """The kind of a parameter: it determines how the argument is converted from Python to C."""

    BOOL = "bool"
    INT = "integer"
    STRING = "string"
    PATH = "file name"
    STRINGS = "list of strings"
    DATA = "bytes that libnbd reads"
    OUTPUT = "bytes that libnbd writes"
    ADDRESS = "socket address"
    CLOSURE = "callback"


class CallbackKind(Enum):
    """The kind of a callback's argument: it determines how it is converted from C to Python."""

    INT = "integer"
    STRING = "string"
    ERROR = "errno that the callback may change"
    VIEW = "bytes inside the caller's buffer"
    INTS = "array of integers"
    PAIRS = "array of structs of two integers"


class Waits(Enum):
    """How a call waits for the server; see generator.waiting."""

    IN_LIBNBD = "not at all, or inside libnbd, where nothing can stop it"
    COMMAND = "for the reply to a command"
    OPTION = "for the reply to an option"
    CONNECT = "for the connection"
    BY_HAND = "in a function of the shim"


#: The variable in which a method has the pin of its buffer.  If the call is stopped, the upcall
#: `orphaned` takes it from there: so this name is an interface between methods.py and upcalls.py.
#: Handing the pin over as a cffi handle or through the registry takes 400 instructions more: 4 in
#: 100 of a pread of 512 bytes, 7 in 100 of a pwrite.
ORPHAN_PIN = "orphan_pin"


class Unbindable(Exception):
    """A declaration that no rule covers.  The message is the reason; see Header.unbound."""


class Parameter(NamedTuple):
    """One parameter of a call.  A buffer and its length in C are one parameter here."""

    name: str
    kind: Kind
    ctype: str
    closure: str = ""
    optional: bool = False
    length: str = ""


class CallbackArgument(NamedTuple):
    """One argument of a callback.  An array and its length in C are one argument here."""

    name: str
    kind: CallbackKind
    ctype: str
    length: str = ""


@dataclass(frozen=True)
class Closure:
    """A callback type: nbd_NAME_callback."""

    name: str
    arguments: tuple[CallbackArgument, ...]

    @property
    def has_buffer(self) -> bool:
        """Whether the callback gets parts of the buffer that its command reads into."""
        return any(argument.kind is CallbackKind.VIEW for argument in self.arguments)


@dataclass(frozen=True)
class Function:
    """A call: nbd_NAME, without its first parameter, the handle."""

    name: str
    returns: str
    parameters: tuple[Parameter, ...]
    waits: Waits = Waits.IN_LIBNBD
    #: X, if this is X_into: the same call, but it reads into memory of the caller.
    form_of: str = ""

    @property
    def is_asynchronous(self) -> bool:
        return self.name.startswith("aio_")

    @property
    def closures(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.kind is Kind.CLOSURE)

    @property
    def buffer(self) -> Parameter | None:
        """The parameter that is a buffer, if any."""
        for parameter in self.parameters:
            if parameter.kind in (Kind.DATA, Kind.OUTPUT):
                return parameter
        return None

    @property
    def filled_later(self) -> Parameter | None:
        """The caller's buffer, if libnbd may write to it after the call has returned."""
        buffer = self.buffer
        is_callers = self.is_asynchronous or self.form_of
        return buffer if buffer and buffer.kind is Kind.OUTPUT and is_callers else None

    @property
    def aio_name(self) -> str:
        """The name of the call that does the same without waiting."""
        return f"aio_{self.form_of or self.name}"

    @property
    def has_buffer_alone(self) -> bool:
        """Whether a call that waits has a buffer, and no callback whose token stands for it."""
        return self.waits is Waits.COMMAND and self.buffer is not None and not self.closures


@dataclass(frozen=True)
class Header:
    """All of libnbd.h.  `unbound` has the name of each declaration without a rule, and why."""

    functions: tuple[Function, ...]
    closures: tuple[Closure, ...]
    constants: tuple[tuple[str, int | str], ...]
    unbound: tuple[tuple[str, str], ...] = ()
