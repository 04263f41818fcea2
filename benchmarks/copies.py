# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copies of whole disks by whole programs; the time includes the start of the process.

Every copy has a new target, whose contents are compared with the source afterwards.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exports import running
from plan import Workload
from programs import call, timed

#: The program that is measured.  It does not flush, because nbdcopy does not by default.
COPY = "import sys, nbd; nbd.copy(*sys.argv[1:], flush=False)"


def measure(command: list[str], workload: Workload, uris: dict[str, str]) -> dict[str, float]:
    """Measure a program that takes a source and a new target as its last arguments."""
    source, kind = workload.servers
    with _new(kind, workload.size, uris) as target:
        sample = timed([*command, uris[source], target])
        if kind != "null":
            call(["qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", uris[source], target])
    return sample


@contextlib.contextmanager
def _new(kind: str, size: int, uris: dict[str, str]) -> Iterator[str]:
    """Yield a new target: the URI of a server, or the name of a file."""
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as folder:
        if kind == "file":
            yield str(Path(folder, "copy"))
        elif kind == "target":
            with running({kind}, size, Path(folder)) as started:
                yield started[kind]
        else:
            yield uris[kind]
