# SPDX-License-Identifier: LGPL-2.0-or-later
"""Callbacks: the registry of what libnbd still needs, and what an upcall does with it.

The life of a callback:

1. A method puts the callable into the registry under a token, a number, and passes the token to the
   shim.  For a command with a buffer, the entry holds the memory as well.
2. libnbd calls the shim, and the shim calls the function of nbd._binding.upcalls for that type of
   callback.  That function finds the callable by the token, converts the arguments and calls it.
3. When libnbd has freed the callback, the shim returns the token by the upcall `release`, at the
   end of a call on the handle, and the entry is removed.

So the registry keeps alive exactly what libnbd still needs.

A signal handler may raise at any bytecode of a method.  Then the method asks the shim which of its
tokens it has taken, and removes the others (`abandon`).

An exception cannot pass through C.  If a callable raises, libnbd gets -1, and `keep` puts the
exception into `pending`, where nbd._binding.errors finds it.
"""

from __future__ import annotations

from _thread import get_ident

from nbd._binding.errors import pending
from nbd._binding.memory import copy_back, free
from nbd._binding.shim import ffi, lib, process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# An entry is a list: the callable (None if only the end of the command matters), the handle, and,
# for a command with a buffer, the caller's object and the pin of the memory that libnbd uses.  The
# entry of a call that was stopped, and had no callable, is its pin.
registry: dict[int, Any] = process.registry
next_token = process.next_token
forget = registry.pop


class ErrorNumber:
    """The errno of a command.  A callback may change it.

    Attributes:
        value: The errno; 0 means success, and then the object is false.
    """

    __slots__ = ("value",)

    value: int

    def __bool__(self) -> bool:
        return self.value != 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value})"


def not_callable(name: str, value: object) -> TypeError:
    """The exception for an argument that is not callable."""
    return TypeError(f"{name}: a callable is needed, not {type(value).__name__}")


def abandon(handle: Any, *tokens: int) -> None:
    """Remove the entries of a call that raised, except those whose tokens the shim has taken."""
    for token in tokens:
        if token and not lib.nbdshim_holds(handle, token):
            forget(token, None)


def keep(raised: BaseException, token: int) -> int:
    """Keep a callable's exception for the method whose call ran it; returns -1, for libnbd."""
    entry = registry.get(token)
    pending.append((get_ident(), entry[1] if entry else None, raised))
    return -1


def already_called(error: ErrorNumber) -> int:
    """Replaces a completion callable in its entry once that is called: a second call fails."""
    return -1


def bring_back(token: int) -> None:
    """Copy what a command has read from its bounce buffer to the caller's object; free the buffer.

    If a signal handler raises meanwhile, this function can be called again.
    """
    entry = registry[token]
    _, _, target, pin = entry
    try:
        copy_back(target, pin)
    except BufferError as resized:
        keep(resized, token)
    entry[2:] = None, None
    free(pin)


def set_errno(address: int, value: int) -> None:
    """Change the errno of a command, at the address that its callback was given."""
    ffi.cast("int *", address)[0] = value


def as_int(result: object) -> int:
    """What libnbd gets for a callable's result: an int unchanged, anything else as 0."""
    return result if isinstance(result, int) else 0
