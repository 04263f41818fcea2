# SPDX-License-Identifier: LGPL-2.0-or-later
"""Disks for asyncio: every call that waits for the server is awaited.

    >>> async def main():
    ...     async with nbd.aio.connect(["nbdkit", "-s", "memory", "1M"]) as disk:
    ...         await disk.pwrite(b"hello", 0)
    ...         return await disk.pread(5, 0)
    >>> asyncio.run(main())
    bytearray(b'hello')

Any number of tasks may use one client at once.  Its depth limits the commands in flight; further
callers wait in line.

A task that is cancelled ends at once.  Its command may still be executed, as NBD cannot revoke it.
The command keeps its memory, and its place among the commands in flight, until the server replies.

A client belongs to the event loop in which it was connected: any loop for asyncio, such as uvloop.
Threads are used only to look up host names (loop.getaddrinfo), to begin TLS connections to a host
name, to wait for the end of a server that was started by a command line, and for nbd.aio.copy.

For trio and other loops, use nbd.queue.Queue, whose fileno and step this module is built on.
"""

from __future__ import annotations

from nbd.aio._client import Client
from nbd.aio._connect import Connecting, connect
from nbd.aio._copy import copy

__all__ = ["Client", "Connecting", "connect", "copy"]
