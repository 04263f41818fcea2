# SPDX-License-Identifier: LGPL-2.0-or-later
"""libnbd for Python: read, write and copy virtual disks over the network block device protocol.

Quick start:

    import nbd

    with nbd.NBD() as h:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_uri("nbd://localhost")
        print(h.get_size())                       # bytes
        boot_sector = h.pread(512, 0)             # a bytearray
        h.pwrite(b"hello", 1024)
        h.flush()

Where things are:

    nbd.NBD           the handle: one method for each call of libnbd (help(nbd.NBD))
    nbd.Error         a call failed: string, errnum and errno say why
    nbd.Timeout       a call did not finish within the timeout of nbd.NBD.settimeout
    nbd.ClosedHandle  a method was called on a closed handle
    nbd.Buffer        memory for the asynchronous calls, aio_*
    nbd.CMD_FLAG_FUA, nbd.TLS_REQUIRE, ...  the constants of libnbd
    nbd.open          a disk as a binary file
    nbd.copy          copy a disk, a file or a stream to another
    nbd.extents       where a disk has data or holes, and which parts have changed
    nbd.connect       a connected handle, also to a server that is still starting
    nbd.aio           disks for asyncio
    nbd.fsspec        disks for programs that open URLs by fsspec; to be imported by its name
    nbd.queue         many commands in flight, over one handle or several
    nbd.memory        how much memory is kept for new nbd.Buffers
    nbd.types         types of callbacks, for annotations
    nbdsh             the shell: type it, or python -m nbd

Timeouts and Ctrl-C:

    Ctrl-C ends a call that waits at once, and so does any signal whose handler raises.  A timeout
    also ends it, if one is set (help(nbd.NBD.settimeout)):

    >>> h.settimeout(0.01)
    >>> try:
    ...     h.poll(-1)  # nothing is in flight, so no reply will arrive
    ... except nbd.Timeout as late:
    ...     print(late.errno)
    ETIMEDOUT

    A command that was stopped may still happen, because NBD cannot cancel it.  Its memory is kept
    until the reply arrives, and the reply is dropped.  The handle remains usable.

A handle is one connection.  Set it up, connect it, then read and write; each call waits for the
server's reply.  The aio_ calls do not wait: they return a cookie, and poll drives the connection.
"""

from __future__ import annotations

from nbd._binding.buffer import Buffer
from nbd._binding.constants import *  # noqa: F403 - one name for each constant of libnbd.h
from nbd._binding.constants import __all__ as _constants
from nbd._binding.errors import ClosedHandle, Error
from nbd._binding.errors import (
    DiskError as DiskError,  # not in __all__, as libnbd's module has none
)
from nbd._binding.errors import Timeout as Timeout  # nor this
from nbd._binding.methods import NBD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nbd import aio as aio
    from nbd import memory as memory
    from nbd import queue as queue
    from nbd import types as types
    from nbd._disks.connect import connect as connect
    from nbd._disks.copy import Copied as Copied
    from nbd._disks.copy import copy as copy
    from nbd._disks.extents import Extent as Extent
    from nbd._disks.extents import Extents as Extents
    from nbd._disks.extents import extents as extents
    from nbd._disks.file import open as open

    #: "libnbd".
    package_name: str
    #: The version of libnbd, the C library, that is running.
    __version__: str
del TYPE_CHECKING

__all__ = ["NBD", "Buffer", "ClosedHandle", "Error", "nbd", "package_name", *_constants]

# Few programs use these names, so they are imported when they are first used.
_MODULES = ("aio", "memory", "queue", "types")
_FUNCTIONS = {
    "Copied": "copy",
    "Extent": "extents",
    "Extents": "extents",
    "connect": "connect",
    "copy": "copy",
    "extents": "extents",
    "open": "file",
}
_LATER = ("__version__", "package_name", *_MODULES, *_FUNCTIONS)


def nbd() -> NBD:
    """A new handle for a with statement, which closes it.

    Example:
        >>> with nbd.nbd() as h:
        ...     h.aio_is_created()
        True

    C: nbd_create and nbd_close, since libnbd 1.0.
    """
    return NBD()


def __getattr__(name: str) -> object:
    if name in _MODULES:
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        from importlib import import_module

        found: object = getattr(import_module(f"nbd._disks.{_FUNCTIONS[name]}"), name)
        globals()[name] = found
        return found
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with NBD() as handle:
        version, package = handle.get_version(), handle.get_package_name()
    globals().update(__version__=version, package_name=package)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
