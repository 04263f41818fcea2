# SPDX-License-Identifier: LGPL-2.0-or-later
"""How many reads a second threads make, each with a handle of its own.

    python benchmarks/threads.py URI

A free-threaded CPython runs it without the GIL, and with PYTHON_GIL=1 with it.
"""

from __future__ import annotations

import sys
import threading
import time

import nbd

SECONDS = 2.0
COUNTS = (1, 8)
SIZES = (4 * 1024, 64 * 1024)


def read(uri: str, size: int, start: threading.Barrier, done: list[int]) -> None:
    """Read random blocks for a while, and append how many."""
    with nbd.NBD() as handle:
        handle.connect_uri(uri)
        blocks = handle.get_size() // size
        start.wait()
        end, count = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            handle.pread(size, count * 7919 % blocks * size)
            count += 1
        done.append(count)


def rate(uri: str, size: int, count: int) -> float:
    """Return how many reads of a size `count` threads make in a second."""
    start, done = threading.Barrier(count), list[int]()
    threads = [threading.Thread(target=read, args=(uri, size, start, done)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / SECONDS


def main() -> None:
    """Print a line for each size and number of threads."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    for size in SIZES:
        for count in COUNTS:
            gil = "with" if has_gil else "without"
            speed = rate(sys.argv[1], size, count)
            print(f"{size // 1024:3} KiB  {count} threads  {gil:7} the GIL  {speed:8.0f} reads/s")


if __name__ == "__main__":
    main()
