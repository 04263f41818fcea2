# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copies of whole disks by whole programs; the time includes the start of the process.

Every copy has a new target, whose contents are compared with the source afterwards.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import plan
from exports import running
from plan import Workload
from programs import call, timed

#: The program of this package.  It does not flush, because nbdcopy does not by default.
_COPY = """
import sys, nbd
source, target = sys.argv[1:]
if source.endswith(".gz"):
    import gzip
    source = gzip.open(source)
nbd.copy(source, None if target == "null:" else target, flush=False)
"""
_UNPACK = 'gzip -dc "$0" | nbdcopy - "$1"'
_CONVERT = ["qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw"]


def command(program: str, source: str, target: str) -> list[str]:
    """The command line of a copy by nbdcopy, by qemu-img, or by a Python interpreter."""
    if program == "qemu-img":
        return [*_CONVERT, source, "null-co://" if target == "null:" else target]
    if program == "nbdcopy":
        unpack = ["sh", "-c", _UNPACK] if source.endswith(".gz") else [program]
        return [*unpack, source, target]
    return [program, "-I", "-c", _COPY, source, target]


def measure(program: str, workload: Workload, uris: dict[str, str]) -> dict[str, float]:
    """Measure one copy, and compare the target with the source."""
    source, kind = workload.servers
    with _new(kind, workload.size) as target:
        sample = timed(command(program, uris[source], target))
        if kind != "null":
            original = uris["half" if source == "gzip" else source]
            call(["qemu-img", "compare", "-f", "raw", "-F", "raw", original, target])
    return sample


@contextlib.contextmanager
def _new(kind: str, size: int) -> Iterator[str]:
    """Yield a new target: the URI of a server, the name of a file, or "null:"."""
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as folder:
        if kind == "null":
            yield "null:"
        elif kind == "file":
            name = str(Path(folder, "copy"))
            with open(name, "wb") as file:
                os.truncate(file.fileno(), size)  # qemu-img convert -n does not create it
            yield name
        else:
            with running({kind}, size, Path(folder)) as started:
                yield started[kind]


def archive(path: Path, size: int) -> str:
    """Make the compressed form of the disk "half", with one member for each repeat of it."""
    piece, every = plan.LAYOUT["half"]
    with gzip.open(path, "wb", 1) as file:
        for place in range(0, size // plan.REPEATS, piece * every):
            file.write(plan.contents(place, piece, size) + bytes(piece * (every - 1)))
    # By a program, because the peak memory of a child is at least that of this process.
    repeat = 'for i in $(seq "$1"); do cat "$0"; done >"$0.all"; mv "$0.all" "$0"'
    call(["sh", "-c", repeat, str(path), str(plan.REPEATS)])
    return str(path)
