# SPDX-License-Identifier: LGPL-2.0-or-later
"""The canonical hexdump that nbdsh shows for a long result."""

from __future__ import annotations

from collections.abc import Iterator

WIDTH = 16
LIMIT = 32

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_PRINTABLE = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))
_BLOCK_ROWS = 4096


def dump(data: memoryview, *, colour: bool = False) -> Iterator[str]:
    """Yield the lines of a hexdump of `data`, a contiguous view of bytes.

    Rows equal to the one before are folded into a single `*`.  After LIMIT lines the dump is cut,
    with a note of how many bytes are not shown.  Otherwise it ends with the length, as hexdump(1)
    does.
    """
    dim, plain = (_DIM, _PLAIN) if colour else ("", "")
    for count, (start, row) in enumerate(_rows(data)):
        if count == LIMIT:
            yield f"{dim}... {len(data) - start} of {len(data)} bytes not shown{plain}"
            return
        yield f"{dim}{start:08x}{plain}  {_columns(row)}" if row else f"{dim}*{plain}"
    yield f"{dim}{len(data):08x}{plain}"


def _rows(data: memoryview) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, row).  An empty row stands for all rows that repeat the one before."""
    end = 0
    while end < len(data):
        start, row = end, bytes(data[end : end + WIDTH])
        end = start + len(row)
        yield start, row
        start, end = end, _end_of_repeats(data, end, row)
        if end > start:
            yield start, b""


def _end_of_repeats(data: memoryview, offset: int, row: bytes) -> int:
    # Large steps first: folding a gigabyte of zeroes row by row takes a minute.
    for pattern in (row * _BLOCK_ROWS, row):
        while offset < len(data) and bytes(data[offset : offset + len(pattern)]) == pattern:
            offset += len(pattern)
    return offset


def _columns(row: bytes) -> str:
    half = WIDTH // 2
    left, right = row[:half].hex(" "), row[half:].hex(" ")
    return f"{left:<23}  {right:<23}  |{row.translate(_PRINTABLE).decode('ascii')}|"
