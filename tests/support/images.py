"""Disk images with data and zeroes, and what a copy of them should count."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from support.sizes import KIB

Ranges = list[tuple[int, int]]

#: How far from a multiple of the block size a run of zeroes may begin or end.
NUDGES = (-513, -512, -511, -1, 0, 0, 0, 1, 511, 512, 513)
#: Lengths of random ranges.
LENGTHS = (0, 1, 511, 512, 513, 4095, 4096, 4097, 64 * KIB, 100_000)
#: File systems report holes of whole blocks of this size.
FILE_BLOCK = 4 * KIB


def runs(rng: random.Random, size: int, block: int) -> bytes:
    """Return runs of data and zeroes that begin and end around multiples of a block size."""
    data = bytearray(rng.randbytes(size))
    at = 0
    while at < size:
        start = max(0, at + rng.choice([0, 1, 1, 2, 3]) * block + rng.choice(NUDGES))
        stop = max(start, start + rng.choice([1, 1, 2, 3, 5]) * block + rng.choice(NUDGES))
        at = min(size, stop)
        data[start:at] = bytes(max(0, at - start))
    return bytes(data)


def zero_bytes(data: bytes, block: int) -> int:
    """Return how many bytes are in blocks of zeroes; the last block may be a part of one."""
    parts = (data[at : at + block] for at in range(0, len(data), block))
    return sum(len(part) for part in parts if is_zero(part))


def is_zero(data: bytes) -> bool:
    """Return whether all bytes are zeroes."""
    return data.count(0) == len(data)


def write_sparse(path: Path, data: bytes, rng: random.Random, before: bytes = b"") -> None:
    """Write a file in which about half of the zeroes are holes, and the others are allocated."""
    whole = before + data
    with path.open("wb") as file:
        file.truncate(len(whole))
        for at in range(0, len(whole), FILE_BLOCK):
            part = whole[at : at + FILE_BLOCK]
            if not is_zero(part) or rng.random() < 0.5:
                file.seek(at)
                file.write(part)


def overlaid(old: bytes, data: bytes, ranges: Iterable[tuple[int, int]]) -> bytes:
    """Return old content, extended with zeroes to the size of data, with ranges of data in it."""
    result = bytearray(old.ljust(len(data), b"\0"))
    for offset, length in ranges:
        result[offset : offset + length] = data[offset : offset + length]
    return bytes(result)


def covered(ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many bytes are in at least one of the ranges."""
    count = last = 0
    for offset, length in sorted(ranges):
        stop = offset + length
        count += max(0, stop - max(offset, last))
        last = max(last, stop)
    return count


def random_ranges(rng: random.Random, size: int) -> Ranges:
    """Return ranges whose ends lie at any place, often near a multiple of a block size."""
    ranges = []
    for _ in range(rng.choice([0, 1, 2, 5, 20])):
        near = rng.randrange(size) // 4096 * 4096 + rng.choice([-1, 0, 0, 0, 1, 511, 512, 2000])
        offset = min(max(0, near), size)
        ranges.append((offset, min(rng.choice(LENGTHS), size - offset)))
    return ranges
