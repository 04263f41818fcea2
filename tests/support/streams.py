"""Read and write descriptors beside a copy, and bound its waits."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

import nbd
from support.signals import SHORT, Stop, alarm
from support.sizes import MIB

SOON = 20.0  # seconds within which a wait must end that would otherwise last for ever
DATA = random.Random(1).randbytes(3 * MIB + 77)


@contextmanager
def stopped(seconds: float = SHORT) -> Iterator[None]:
    """Stop the block by a signal after some time, and fail if it does not end soon."""
    gc.collect()  # PyPy loses exceptions in the callback of a weak reference
    began = time.monotonic()
    with alarm(seconds=seconds), pytest.raises(Stop):
        yield
    assert time.monotonic() - began < SOON


@contextmanager
def late() -> Iterator[None]:
    """Expect nbd.Timeout of the block, which has a short timeout."""
    began = time.monotonic()
    with pytest.raises(nbd.Timeout):
        yield
    assert time.monotonic() - began < SOON


@contextmanager
def reading(fd: int) -> Iterator[bytearray]:
    """Read everything from a descriptor, in a thread."""
    received = bytearray()

    def read() -> None:
        with open(fd, "rb", 0) as file, suppress(OSError):  # EIO: the end of a terminal
            for part in iter(lambda: file.read(MIB), b""):
                received.extend(part)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield received
    finally:
        thread.join()


@contextmanager
def writing(fd: int, data: bytes, parts: int = 7) -> Iterator[None]:
    """Write data to a descriptor in parts, in a thread."""

    def write() -> None:
        size = len(data) // parts + 1
        with open(fd, "wb", 0) as file:
            for at in range(0, len(data), size):
                rest = memoryview(data)[at : at + size]
                while rest:
                    rest = rest[file.write(rest) :]

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        thread.join()
