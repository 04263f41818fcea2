# SPDX-License-Identifier: LGPL-2.0-or-later
"""Many commands in flight, over one handle or several: the engine under nbd.open and nbd.copy.

Add requests, which does not wait; then wait for those that are done:

    >>> with nbd.queue.Queue(h, depth=16) as queue:
    ...     request = queue.read(bytearray(4096), 0)
    ...     done = queue.wait()
"""

from __future__ import annotations

from nbd._disks.queue import Queue, Request

__all__ = ["Queue", "Request"]
