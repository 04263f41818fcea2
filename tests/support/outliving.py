"""What the tests share of files, copies and clients that outlive their server."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any, Callable

import pytest

from support.cutting import Cutter, no_limit
from support.forms import SOAK
from support.hostile import Watchdog
from support.servers import TIMEOUT
from support.sizes import KIB
from support.usage import collect_garbage, descriptors
from support.volatile import VolatileServer

LONG = 3.0 * TIMEOUT  # seconds for which it is tried to connect again: longer than a test takes
SEEDS = range(200 if SOAK else 6)
#: Minimum, preferred and maximum block size.
BLOCKS = ((), (512, 4096, 32 * KIB), (4096, 4096, 64 * KIB))


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """End a test that hangs."""
    with Watchdog(2 * LONG, bool) as dog:
        yield
    assert not dog.late


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail if a test leaves a descriptor or a thread."""
    collect_garbage()
    files, before = descriptors(), threads()
    yield
    wait_until(lambda: threads() <= before)
    collect_garbage()
    assert descriptors() <= files


def threads() -> int:
    """Return how many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait; the watchdog bounds it."""
    while not reached():
        time.sleep(0.001)


def any_server(rng: random.Random) -> dict[str, Any]:
    """Return the options of a server, at random."""
    return {
        "tcp": rng.random() < 0.5,
        "blocks": rng.choice(BLOCKS),
        "shuffles": rng.random() < 0.5,
        "structured": rng.random() < 0.7,
        "writes_back": rng.choice([0, 0.2]),
        "seed": rng.randrange(1 << 30),
    }


def cutter(server: VolatileServer, limit: Callable[[], int | None] = no_limit) -> Cutter:
    """Return a proxy for a server, in its folder."""
    address = server.options.address
    return Cutter(address, 0 if isinstance(address, int) else f"{address}-proxy", limit)
