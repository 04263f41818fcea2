# SPDX-License-Identifier: LGPL-2.0-or-later
"""Many commands in flight, over one handle or several.  nbd.open and nbd.copy are built on this.

Submit requests, which does not wait; then wait until they are done:

    >>> with nbd.queue.Queue(h, depth=16) as queue:
    ...     request = queue.read(bytearray(4096), 0)
    ...     done = queue.wait()
"""

from __future__ import annotations

from nbd._disks.queue import Queue, Request

__all__ = ["Queue", "Request"]
