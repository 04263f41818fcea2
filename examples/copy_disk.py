# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copy a disk between servers, files and block devices.

If tqdm is installed, a bar shows the progress.

    python copy_disk.py                       # from one nbdkit to another
    python copy_disk.py nbd://here/disk nbd://there/disk
    python copy_disk.py nbd://here/disk disk.img
"""

from __future__ import annotations

import sys

import nbd

SOURCE = ["nbdkit", "-s", "--exit-with-parent", "sparse-random", "256M", "seed=1"]
TARGET = ["nbdkit", "-s", "--exit-with-parent", "memory", "256M"]


def copy(source: str | list[str], target: str | list[str]) -> nbd.Copied:
    """Copy, with a bar if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nbd.copy(source, target)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return nbd.copy(source, target, progress=progress)


def main() -> None:
    """Copy as the arguments say, or between two servers that are started for it."""
    source, target = sys.argv[1:] or (SOURCE, TARGET)
    done = copy(source, target)
    print(f"copied {done.copied} bytes, zeroed {done.zeroed}")


if __name__ == "__main__":
    try:
        main()
    except (nbd.Error, OSError) as reason:
        sys.exit(f"{sys.argv[0]}: {reason}")
