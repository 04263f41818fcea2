"""Measure what this process holds: memory, file descriptors, callables and buffers."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import nbd


def collect_garbage() -> None:
    """Collect garbage; PyPy needs more than one collection to run every finalizer.

    On CPython the shim's memory of a collected handle is freed when the next handle is made.
    """
    for _ in range(1 if sys.implementation.name == "cpython" else 3):
        gc.collect()
    nbd.NBD().close()


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def descriptors() -> int:
    """Return how many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def registered() -> int:
    """Return how many callables and buffers are registered for libnbd; collect garbage if any."""
    if nbd._binding.callbacks.registry:
        collect_garbage()
    return len(nbd._binding.callbacks.registry)


class Bytes(bytearray):
    """A bytearray that supports weak references."""
