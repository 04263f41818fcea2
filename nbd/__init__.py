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
    nbd.ClosedHandle  a method was called on a closed handle
    nbd.Buffer        memory for the asynchronous calls, aio_*
    nbd.CMD_FLAG_FUA, nbd.TLS_REQUIRE, ...  the constants of libnbd
    nbd.types         types of callbacks, for annotations
    nbdsh             the shell: type it, or python -m nbd

A handle is one connection.  Set it up, connect it, then read and write; each call waits for the
server's reply.  The aio_ calls do not wait: they return a cookie, and poll drives the connection.
"""

from __future__ import annotations

from nbd import constants as _constants
from nbd.buffer import Buffer
from nbd.constants import *  # noqa: F403 - one name for each constant of libnbd.h
from nbd.error import ClosedHandle, Error
from nbd.methods import NBD

__all__ = [
    "NBD",
    "Buffer",
    "ClosedHandle",
    "Error",
    "nbd",
    "package_name",
    *_constants.__all__,
]


def nbd() -> NBD:
    """A new handle for a with statement, which closes it.

    Example:
        >>> with nbd.nbd() as h:
        ...     h.aio_is_created()
        True

    C: nbd_create and nbd_close, since libnbd 1.0.
    """
    return NBD()


with NBD() as _handle:
    #: "libnbd".
    package_name = _handle.get_package_name()
    #: The version of libnbd, the C library, that is running.
    __version__ = _handle.get_version()
del _handle
