# SPDX-License-Identifier: LGPL-2.0-or-later
"""What libnbd.h says, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """How a parameter of a call travels between Python and C."""

    BOOL = "bool"
    INT = "integer"
    STRING = "string"
    PATH = "file name"
    STRINGS = "list of strings"
    DATA = "bytes that libnbd reads"
    ROOM = "bytes that libnbd writes"
    ADDRESS = "socket address"
    CLOSURE = "callback"


class CallbackKind(Enum):
    """How an argument of a callback travels from C up to Python."""

    INT = "integer"
    STRING = "string"
    ERROR = "errno that the callback may change"
    VIEW = "bytes inside the caller's buffer"
    INTS = "array of integers"
    PAIRS = "array of structs of two integers"


class Unbindable(Exception):
    """A declaration that no rule covers."""


class Parameter(NamedTuple):
    """One parameter of a call; a buffer and its length count as one."""

    name: str
    kind: Kind
    ctype: str
    closure: str = ""
    optional: bool = False
    length: str = ""


class CallbackArgument(NamedTuple):
    """One argument of a callback; an array and its length count as one."""

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
        """Whether it is shown parts of the buffer of its command."""
        return any(argument.kind is CallbackKind.VIEW for argument in self.arguments)


@dataclass(frozen=True)
class Function:
    """A call: nbd_NAME, without its first parameter, the handle."""

    name: str
    returns: str
    parameters: tuple[Parameter, ...]

    @property
    def is_asynchronous(self) -> bool:
        return self.name.startswith("aio_")

    @property
    def closures(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.kind is Kind.CLOSURE)

    @property
    def buffer(self) -> Parameter | None:
        """The parameter that is a buffer, if there is one."""
        for parameter in self.parameters:
            if parameter.kind in (Kind.DATA, Kind.ROOM):
                return parameter
        return None

    @property
    def filled_later(self) -> Parameter | None:
        """The caller's buffer that libnbd writes after the call has returned, if there is one."""
        buffer = self.buffer
        return buffer if buffer and buffer.kind is Kind.ROOM and self.is_asynchronous else None


@dataclass(frozen=True)
class Header:
    """All of libnbd.h."""

    functions: tuple[Function, ...]
    closures: tuple[Closure, ...]
    constants: tuple[tuple[str, int | str], ...]
    unbound: tuple[tuple[str, str], ...] = ()
