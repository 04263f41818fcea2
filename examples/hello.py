# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write to a disk in memory, read it back, and list the extents of the disk.

This needs nbdkit.  The handle starts it, and stops it when the handle is closed.

    python hello.py
"""

from __future__ import annotations

import sys

import nbd

SERVER = [
    *("nbdkit", "-s", "--exit-with-parent", "--filter=blocksize-policy", "memory", "1M"),
    *("blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=32M"),
]
MESSAGE = b"Hello from the other end of a socket.".ljust(512, b".")
OFFSETS = (0, 512 * 1024)


def describe(h: nbd.NBD) -> None:
    """Print the size of the export, and the sizes of requests that the server accepts."""
    print(f"export: {h.get_size()} bytes")
    print(f"block size: at least {h.get_block_size(nbd.SIZE_MINIMUM)} bytes", end=", ")
    print(f"{h.get_block_size(nbd.SIZE_PREFERRED)} preferred", end=", ")
    print(f"at most {h.get_block_size(nbd.SIZE_MAXIMUM)}")


def write_and_verify(h: nbd.NBD) -> None:
    """Write the message twice and read it back."""
    for offset in OFFSETS:
        h.pwrite(MESSAGE, offset)
    h.flush()
    for offset in OFFSETS:
        if h.pread(len(MESSAGE), offset) != MESSAGE:
            sys.exit(f"other data was read at {offset} than was written")
        print(f"wrote {len(MESSAGE)} bytes at {offset}, read them back, verified")


def hexdump(data: bytearray) -> None:
    """Print bytes as hexadecimal digits and as text, 16 to a line."""
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        print(f"  {start:08x}  {row.hex(' '):<47}  |{text}|")


def extents(h: nbd.NBD) -> list[tuple[int, int, int]]:
    """Return (offset, length, flags) for each extent of the export.

    A reply may cover only the first part of the range, so the rest is requested until the end.
    """
    found: list[tuple[int, int, int]] = []

    def extent(context: str, offset: int, entries: list[int], error: object) -> None:
        for length, flags in zip(entries[::2], entries[1::2]):
            found.append((offset, length, flags))
            offset += length

    size, position = h.get_size(), 0
    while position < size:
        h.block_status(size - position, position, extent)
        offset, length, _ = found[-1]
        position = offset + length
    return found


def main() -> None:
    """Run the tour."""
    with nbd.NBD() as h:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_command(SERVER)
        describe(h)
        write_and_verify(h)
        print("first bytes:")
        hexdump(h.pread(len(MESSAGE), 0)[:64])
        print("extents:")
        for offset, length, flags in extents(h):
            print(f"  {offset:>8} {length:>8} {'hole' if flags & nbd.STATE_HOLE else 'data'}")


if __name__ == "__main__":
    main()
