# SPDX-License-Identifier: LGPL-2.0-or-later
"""Values between Python and C: numbers, strings, lists and socket addresses.

`as_*` and `address_of` convert arguments for C.  `owned_text` and `pairs` convert results of C.
"""

from __future__ import annotations

import os
from _operator import index

from nbd._binding.errors import UnknownHost
from nbd._binding.shim import as_text, ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# The size of C's struct sockaddr_storage, which can hold any kind of address.
_SOCKADDR_SIZE = 128

#: The bytes at a char pointer.
string = ffi.string
#: A list of the integers at a pointer.
unpack = ffi.unpack


def as_number(name: str, value: object) -> int:
    """An exact int.  The methods of a subclass could return another number each time."""
    number: Any = value
    if not issubclass(type(value), int):
        try:
            number = index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name}: int is needed, not {type(value).__name__}") from None
    return int.__or__(number, 0)  # PyPy's int() and int.__index__ call the subclass's methods


def as_seconds(name: str, value: object) -> float:
    """A positive number of seconds, as a float."""
    if not hasattr(type(value), "__float__") and not hasattr(type(value), "__index__"):
        kind = type(value).__name__
        raise TypeError(f"{name}: a number of seconds or None is needed, not {kind}")
    seconds = float(value)  # type: ignore[arg-type]
    if not seconds > 0:
        raise ValueError(f"{name}: {value} is not more than 0; None means no timeout")
    return seconds


def as_string(name: str, value: str) -> bytes:
    """A str as C's UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: str is needed, not {type(value).__name__}")
    return _without_nul(name, str.encode(value, "utf-8", "surrogateescape"))


def as_path(name: str, value: Any) -> bytes:
    """A file name: str, bytes or os.PathLike."""
    try:
        value = os.fspath(value)
    except TypeError:
        raise TypeError(
            f"{name}: str, bytes or os.PathLike is needed, not {type(value).__name__}"
        ) from None
    if isinstance(value, str):
        value = str.encode(value, "utf-8", "surrogateescape")
    return _without_nul(name, memoryview(value).tobytes())


def _without_nul(name: str, value: bytes) -> bytes:
    if b"\0" in value:
        raise ValueError(f"{name}: a NUL character cannot be passed to C")
    return value


def as_strings(name: str, values: Iterable[str]) -> tuple[Any, list[Any]]:
    """A list of str as C's NULL-terminated array, and the strings, which must live as long."""
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: a list of str is needed, not {type(values).__name__}")
    try:
        listed = list(values)
    except TypeError:
        raise TypeError(f"{name}: a list of str is needed, not {type(values).__name__}") from None
    items = [ffi.new("char[]", as_string(f"{name}[{i}]", v)) for i, v in enumerate(listed)]
    return ffi.new("char *[]", [*items, ffi.NULL]), items


def address_of(address: Any) -> tuple[Any, int]:
    """The struct sockaddr for an address of the socket module, and its length.

    A str, bytes or os.PathLike is the path of a Unix socket, or an abstract address if it begins
    with NUL.  (host, port) is IPv4, or IPv6 if the host has no IPv4 address.  (host, port, flow,
    scope) is IPv6.
    """
    storage = ffi.new("char[]", _SOCKADDR_SIZE)
    if isinstance(address, tuple) and len(address) in (2, 3, 4):
        size = _internet_address(storage, *address)
    elif isinstance(address, (str, bytes)) or hasattr(address, "__fspath__"):
        name = memoryview(os.fsencode(address)).tobytes()
        size = lib.nbdshim_address_unix(storage, _SOCKADDR_SIZE, name, len(name))
        if size == 0:
            raise ValueError(f"addr: a Unix socket's path has at most 107 bytes: {address!r}")
    else:
        raise TypeError(
            "addr: str (Unix), (host, port) or (host, port, flow, scope) is needed, "
            f"not {type(address).__name__}"
        )
    return storage, size


def _internet_address(storage: Any, host: str, port: int, flow: int = -1, scope: int = 0) -> int:
    import socket

    if not isinstance(host, str):
        raise TypeError(f"addr: the host must be str, not {type(host).__name__}")
    if not hasattr(port, "__index__"):
        raise TypeError(f"addr: the port must be int, not {type(port).__name__}")
    number = as_number("addr: the port", port)
    if not 0 <= number <= 65535:
        raise OverflowError(f"addr: the port must be between 0 and 65535, not {number}")
    families = [socket.AF_INET, socket.AF_INET6] if flow < 0 else [socket.AF_INET6]
    reason: Exception | None = None
    for family in families:
        try:
            found = socket.getaddrinfo(host, number, family, socket.SOCK_STREAM)
        except OSError as raised:
            reason = raised
            continue
        resolved: tuple[Any, ...] = found[0][4]
        packed = socket.inet_pton(family, str(resolved[0]).partition("%")[0])
        if family == socket.AF_INET:
            size: int = lib.nbdshim_address_inet(storage, _SOCKADDR_SIZE, packed, number)
        else:
            size = lib.nbdshim_address_inet6(
                storage, _SOCKADDR_SIZE, packed, number, max(flow, 0), scope or int(resolved[3])
            )
        return size
    raise UnknownHost(f"nbd_aio_connect: {host}: {reason}")


def owned_text(pointer: Any) -> str:
    """The string at a char pointer, which is freed."""
    try:
        return as_text(pointer)
    finally:
        lib.nbdshim_free(pointer)


def pairs(array: Any, length: int) -> list[tuple[int, int]]:
    """A list from a C array of structs of two integers each."""
    flat = iter(unpack(array, 2 * length))
    return list(zip(flat, flat))
