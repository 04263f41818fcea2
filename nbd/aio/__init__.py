# SPDX-License-Identifier: LGPL-2.0-or-later
"""Disks for asyncio: every call that waits for the server is awaited.

    >>> async def main():
    ...     async with nbd.aio.connect(["nbdkit", "-s", "memory", "1M"]) as disk:
    ...         await disk.pwrite(b"hello", 0)
    ...         return await disk.pread(5, 0)
    >>> asyncio.run(main())
    bytearray(b'hello')

Any number of tasks may use one client at once.  So many commands as its depth are in flight; the
other callers wait in line.

A task that is cancelled ends at once.  Its command may still happen: NBD cannot take it back.  The
command keeps its memory until the server answers, and its place among those in flight.

A client belongs to the event loop in which it was connected: any loop of asyncio's, such as
uvloop's.  Nothing runs in a thread but the look-up of a host's name (loop.getaddrinfo); the begin
of a connection over TLS to a host that has a name; the end of a server that was started by a
command line; and nbd.aio.copy.

For trio and other loops, nbd.queue.Queue has what this module is built on: fileno and step.
"""

from __future__ import annotations

from nbd.aio._client import Client
from nbd.aio._connect import Connecting, connect
from nbd.aio._copy import copy

__all__ = ["Client", "Connecting", "connect", "copy"]
