# SPDX-License-Identifier: LGPL-2.0-or-later
"""The workloads: the servers, the sizes and the number of operations of each.

The numbers of operations are fixed, so that every subject does the same work.  With libnbd's own
module, one run takes 0.2 to 1 s on a small machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

QUICK_DIVISOR = 10
#: PyPy compiles a loop after a thousand iterations, and later the exits from it.
WARM_UP = 2_000
WARM_UP_BYTES = 2_000 * MIB
QUICK_WARM_UP_BYTES = 128 * MIB


@dataclass(frozen=True)
class Workload:
    """One row of the table: a function, and how many operations it carries out.

    ``kind`` names a function of ``workloads.py`` and a case of ``limit.c``.  ``servers`` has one
    entry for each handle to connect.  ``warm_up`` operations run before the clock starts, for
    caches and just-in-time compilers.  ``clock`` is ``wall`` for elapsed time, or ``both`` for
    the client's processor time as well.  ``fresh`` workloads allocate memory for each operation: a
    buffer, or the contents of a new target.  ``python_only`` workloads are not measured in C.
    """

    name: str
    kind: str
    operations: int
    servers: tuple[str, ...] = ()
    size: int = 0
    depth: int = 1
    clock: str = "wall"
    warm_up: int = 0
    fresh: bool = False
    python_only: bool = False

    @property
    def is_whole_copy(self) -> bool:
        """Whether a process that copies a whole disk is timed."""
        return self.kind == WHOLE_COPY

    @property
    def fresh_bytes(self) -> int:
        """How much memory a subject needs that never reuses a buffer."""
        return (self.operations + self.warm_up) * self.size if self.fresh else 0

    def arguments(self, uris: dict[str, str]) -> list[str]:
        """The arguments of a child process, the same for Python and for C."""
        numbers = (self.operations, self.warm_up, self.size, self.depth)
        return [self.kind, *map(str, numbers), *(uris[server] for server in self.servers)]


NULL, MEMORY = ("null",), ("memory",)
#: The kind of the workloads that copies.py runs.
WHOLE_COPY = "whole-copy"
#: The contents of disks repeat after this part of them, so that the archive can be made quickly.
REPEATS = 16

_ALL = (
    Workload("import", "import", 10, python_only=True),
    Workload("getter", "getter", 2_000_000, NULL, python_only=True),
    Workload("debug-callback", "debug-callback", 600_000, NULL, python_only=True),
    Workload("pread-512", "pread", 10_000, NULL, 512),
    Workload("pread-64k", "pread", 7_000, NULL, 64 * KIB),
    Workload("pread-1m", "pread", 1_000, NULL, MIB),
    Workload("pread-32m", "pread", 20, NULL, 32 * MIB, fresh=True),
    Workload("pread-into-64k", "pread-into", 7_000, NULL, 64 * KIB),
    Workload("pwrite-64k", "pwrite", 7_000, NULL, 64 * KIB),
    Workload("aio-pread-4k", "aio-pread", 30_000, NULL, 4 * KIB, 64, fresh=True),
    Workload("aio-pread-64k", "aio-pread", 5_000, NULL, 64 * KIB, 16, fresh=True),
    Workload("aio-pread-1m", "aio-pread", 600, NULL, MIB, 8, fresh=True),
    Workload("aio-pread-4k-bytearray", "aio-pread-bytearray", 30_000, NULL, 4 * KIB, 64),
    Workload("aio-pread-64k-bytearray", "aio-pread-bytearray", 10_000, NULL, 64 * KIB, 16),
    Workload("aio-pwrite-64k", "aio-pwrite", 10_000, NULL, 64 * KIB, 16),
    Workload("threads-8", "threads", 8_000, NULL * 8, 64 * KIB, python_only=True),
    Workload("handles", "handles", 300_000, python_only=True),
    Workload("queue-4k", "queue", 60_000, NULL, 4 * KIB, 64, python_only=True),
    Workload("queue-64k", "queue", 20_000, NULL, 64 * KIB, 16, python_only=True),
    Workload("file-4k", "file", 131_072, MEMORY, 4 * KIB, clock="both", python_only=True),
    Workload("file-64k", "file", 16_384, MEMORY, 64 * KIB, clock="both", python_only=True),
    Workload("file-64k-1ms", "file", 4_096, ("late",), 64 * KIB, python_only=True),
    Workload("await-4k", "awaited", 30_000, NULL, 4 * KIB, 64, fresh=True, python_only=True),
    Workload("await-64k", "awaited", 20_000, NULL, 64 * KIB, 16, fresh=True, python_only=True),
    Workload("copy-memory-null", WHOLE_COPY, 1, ("memory", "null"), GIB, fresh=True),
    Workload("copy-memory-memory", WHOLE_COPY, 1, ("memory", "target"), GIB, fresh=True),
    Workload("copy-sparse-file", WHOLE_COPY, 1, ("sparse", "file"), GIB, fresh=True),
    Workload("copy-half-file", WHOLE_COPY, 1, ("half", "file"), GIB, fresh=True),
    Workload("copy-half-qcow2", WHOLE_COPY, 1, ("half", "qcow2"), GIB, fresh=True),
    Workload("copy-gzip-memory", WHOLE_COPY, 1, ("gzip", "target"), GIB, fresh=True),
)


def is_chosen(name: str, only: list[str]) -> bool:
    """Whether a name matches one of the patterns; all do, if there are none."""
    return not only or any(fnmatchcase(name, pattern) for pattern in only)


def workloads(only: list[str], quick: bool) -> list[Workload]:
    """The workloads whose name matches one of the patterns in ``only``; all, if that is empty."""
    chosen = [w for w in _ALL if is_chosen(w.name, only)]
    sized = [_sized(w, quick) for w in chosen]
    size = memory_size(sized)
    return [replace(w, size=size) if w.is_whole_copy else w for w in sized]


def _sized(workload: Workload, quick: bool) -> Workload:
    if workload.is_whole_copy:
        return replace(workload, size=workload.size // (QUICK_DIVISOR if quick else 1))
    operations = max(workload.operations // (QUICK_DIVISOR if quick else 1), 2)
    warm_up = workload.operations // (QUICK_DIVISOR if quick else 4)
    if workload.size:
        most = QUICK_WARM_UP_BYTES if quick or workload.fresh else WARM_UP_BYTES
        warm_up = min(max(warm_up, WARM_UP), 2 * workload.operations, most // workload.size)
    return replace(workload, operations=operations, warm_up=warm_up)


def memory_size(chosen: list[Workload]) -> int:
    """The size in bytes of the servers that have contents."""
    sizes = [max(w.operations, w.warm_up) * w.size for w in chosen if _FILLED & {*w.servers}]
    return -(-max(sizes, default=0) // (REPEATS * MIB)) * REPEATS * MIB


def contents(place: int, size: int, disk_size: int) -> bytes:
    """Some bytes of a disk: hexadecimal digits, which gzip packs to half, at random."""
    seed = place % max(disk_size // REPEATS, 1)
    return random.Random(seed).getrandbits(4 * size).to_bytes(size // 2, "big").hex().encode()


#: The size of a disk's pieces of data, and their distance in pieces; between them it has zeroes.
LAYOUT = {"memory": (MIB, 1), "sparse": (MIB, 10), "half": (64 * KIB, 2)}
_FILLED = {*LAYOUT, "gzip"}


def fills(names: set[str], size: int) -> list[Workload]:
    """The work that fills the servers, before anything is measured."""
    return [
        Workload("fill", "fill", size // piece // every, (name,), piece, every)
        for name, (piece, every) in LAYOUT.items()
        if name in names
    ]
