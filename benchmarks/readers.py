# SPDX-License-Identifier: LGPL-2.0-or-later
"""What real readers of disks make nbd.open read, beside a local file.

Usage: readers.py NAME DISK URI

As a program this reads a disk, first as a local file and then by nbd.open, and prints what was read
of the local file.  The log of the server has what nbd.open requested.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import random
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

PAGE = 4096
#: The pages that the kernel reads ahead by default, and the most that FUSE requests: 128 KiB.
AHEAD = 32

_FILES = """
import os, random
os.mkdir("tree")
sizes = random.Random(0)
for number in range(200):
    with open(f"tree/file{number}", "wb") as file:
        file.write(os.urandom(int(2 ** sizes.uniform(8, 21))))
"""
_PARQUET = """
import random, pyarrow, pyarrow.parquet
columns = {f"column{i}": [random.random() for _ in range(400_000)] for i in range(8)}
pyarrow.parquet.write_table(pyarrow.table(columns), "disk", row_group_size=100_000)
"""
#: Shell commands that make the file "disk", with the folder "tree" in it.
_MAKE = {
    "ext4": "mke2fs -q -t ext4 -d tree disk 128M",
    "ntfs": "truncate -s 128M disk; mkntfs -q -F -Q disk"
    '; for f in tree/*; do ntfscp -q -f disk "$f" "${f#tree/}"; done',
    "xfs": "(echo / 0 0 d--755 0 0; cd tree; for f in *; do echo $f ---644 0 0 tree/$f; done"
    "; echo $) >tree.txt; mkfs.xfs -q -p tree.txt -d file,name=disk,size=320m",
    "tar": "tar -cf disk tree",
    "zip": '"$0" -m zipfile -c disk tree',
    "parquet": f"\"$0\" -c '{_PARQUET}'",
    "random": "truncate -s 1G disk",
}


def _dissect(library: str, disk: Any) -> Iterator[bytes]:
    system = getattr(importlib.import_module(f"dissect.{library.lower()}"), library)(disk)
    root = system.mft.get(5) if library == "NTFS" else system.root
    for name, node in sorted(root.listdir().items()):
        if name.startswith("file"):
            yield (node.dereference() if library == "NTFS" else node).open().read()


def _tsk(disk: Any) -> Iterator[bytes]:
    pytsk3: Any = importlib.import_module("pytsk3")

    class Image(pytsk3.Img_Info):  # type: ignore[misc]
        def read(self, offset: int, size: int) -> Any:
            disk.seek(offset)
            return disk.read(size)

        def get_size(self) -> Any:
            return disk.seek(0, os.SEEK_END)

    for entry in pytsk3.FS_Info(Image("")).open_dir("/"):
        if entry.info.name.name.startswith(b"file"):
            yield entry.read_random(0, entry.info.meta.size)


def _tar(disk: Any) -> Iterator[bytes]:
    with tarfile.open(fileobj=disk) as archive:
        yield from map(str.encode, archive.getnames())


def _zip(disk: Any) -> Iterator[bytes]:
    with zipfile.ZipFile(disk) as archive:
        yield from map(str.encode, archive.namelist())


def _columns(disk: Any) -> Iterator[bytes]:
    parquet = importlib.import_module("pyarrow.parquet")
    yield str(parquet.read_table(disk, columns=["column2", "column5"])).encode()


def _random(size: int, count: int, disk: Any) -> Iterator[bytes]:
    places = random.Random(0)
    end = disk.seek(0, os.SEEK_END)
    for _ in range(count):
        disk.seek(places.randrange(end - size))
        yield disk.read(size)


#: The disk of each reader, and the function that reads it.
READERS: dict[str, tuple[str, Callable[[Any], Iterator[bytes]]]] = {
    "read-ext4-dissect": ("ext4", partial(_dissect, "ExtFS")),
    "read-ntfs-dissect": ("ntfs", partial(_dissect, "NTFS")),
    "read-xfs-dissect": ("xfs", partial(_dissect, "XFS")),
    "read-ext4-tsk": ("ext4", _tsk),
    "read-ntfs-tsk": ("ntfs", _tsk),
    "read-tar": ("tar", _tar),
    "read-zip": ("zip", _zip),
    "read-parquet": ("parquet", _columns),
    "read-random-4k": ("random", partial(_random, 4 << 10, 400)),
    "read-random-64k": ("random", partial(_random, 64 << 10, 200)),
    "read-random-1m": ("random", partial(_random, 1 << 20, 50)),
}

#: A number of reads or requests, and of their bytes, by what made them.
Counts = dict[str, tuple[int, int]]


class Recorded(io.FileIO):
    """A local file that records what is read of it."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reads: list[tuple[int, int]] = []

    def readinto(self, buffer: Any) -> int:
        self.reads.append((self.tell(), super().readinto(buffer) or 0))
        return self.reads[-1][1]


def fetched(reads: list[tuple[int, int]], size: int) -> tuple[int, int]:
    """How many requests and bytes these reads of a mounted disk would take.

    This is a model of the kernel's read-ahead: a read that continues the one before it fetches
    AHEAD pages where it finds none in the cache, and any other read only the pages that it touches.
    """
    cached: set[int] = set()
    requests = position = 0
    for place, count in reads:
        is_next, position = place == position, place + count
        last = -(-position // PAGE)
        for page in range(place // PAGE, last):
            if page not in cached:
                end = page + AHEAD if is_next else min(page + AHEAD, last)
                cached.update(range(page, min(end, -(-size // PAGE))))
                requests += 1
    return requests, min(len(cached) * PAGE, size)


def measure(name: str, python: str, libraries: str) -> Counts:
    """Run a reader; returns the reads of a local file, and requests by nbd.open and the model."""
    from exports import running
    from programs import call

    paths = [f"PYTHONPATH={libraries}", f"PATH={os.environ['PATH']}:/usr/sbin:/sbin"]
    script = os.path.abspath(__file__)
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as temporary:
        folder = Path(temporary)
        call([python, "-c", _FILES], folder)
        call(["env", *paths, "sh", "-ec", _MAKE[READERS[name][0]], python], folder)
        with running({"disk"}, 0, folder) as uris:
            read = ["env", *paths, python, script, name, "disk", uris["disk"]]
            sample: Counts = json.loads(call(read, folder))
        requests = re.findall(r" Read id=\d+ offset=\w+ count=(\w+)", (folder / "log").read_text())
    return {**sample, "nbd": (len(requests), sum(int(count, 16) for count in requests))}


def main(name: str, disk: str, uri: str) -> None:
    """Read the disk as a file and by nbd.open, and print what was read of the file."""
    import nbd

    read = READERS[name][1]
    recorded = Recorded(disk)
    expected = hashlib.sha256(b"".join(read(io.BufferedReader(recorded)))).digest()
    with nbd.open(uri) as file:
        if hashlib.sha256(b"".join(read(file))).digest() != expected:
            raise RuntimeError("nbd.open reads something else than open")
    local = len(recorded.reads), sum(count for _, count in recorded.reads)
    print(json.dumps({"local": local, "ahead": fetched(recorded.reads, os.path.getsize(disk))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
