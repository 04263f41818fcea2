"""What tests do with a queue."""

from __future__ import annotations

import nbd
import nbd.queue


def finished(queue: nbd.queue.Queue, least: int = 1) -> list[nbd.queue.Request]:
    """Wait for all requests, and return them."""
    found = []
    while len(queue):
        found += queue.wait(least)
    return found
