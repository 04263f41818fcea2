# SPDX-License-Identifier: LGPL-2.0-or-later
"""Copies of whole disks by whole programs: the time of each has the start of its process in it.

Every copy goes to a target that is new, and what arrived there is compared with the source.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exports import running
from plan import Workload
from programs import call, timed

#: What nbd.copy has to do, as a program.  nbdcopy flushes only if it is told to.
COPY = "import sys, nbd; nbd.copy(*sys.argv[1:], flush=False)"


def measure(command: list[str], workload: Workload, uris: dict[str, str]) -> dict[str, float]:
    """Run a program with the source and a new target as its last arguments."""
    source, kind = workload.servers
    with _new(kind, workload.size, uris) as target:
        sample = timed([*command, uris[source], target])
        if kind != "null":
            call(["qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", uris[source], target])
    return sample


@contextlib.contextmanager
def _new(kind: str, size: int, uris: dict[str, str]) -> Iterator[str]:
    """A target: the URI of a server, or the name of a file."""
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as folder:
        if kind == "file":
            yield str(Path(folder, "copy"))
        elif kind == "target":
            with running({kind}, size, Path(folder)) as started:
                yield started[kind]
        else:
            yield uris[kind]
