# SPDX-License-Identifier: LGPL-2.0-or-later
"""Many commands in flight, over one handle or several: the engine under nbd.open and nbd.copy.

    with nbd.queue.Queue(h, depth=16) as queue:
        request = queue.read(buffer, offset)    # does not wait
        for done in queue.wait():               # does
            ...
"""

from __future__ import annotations

from nbd._core.queue import Queue, Request

__all__ = ["Queue", "Request"]
