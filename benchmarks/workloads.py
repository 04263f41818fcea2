# SPDX-License-Identifier: LGPL-2.0-or-later
"""The workloads in Python: ``run.py`` starts this program with each interpreter.

Usage: workloads.py KIND OPERATIONS WARM-UP SIZE DEPTH [URI...]

The loops are those that a user of libnbd's own module would write, and use only what that module
has, so that the same source runs with every subject.  An interface that only this package has is
compared with the code that its users would write without it.  One handle is connected for each URI
before the clock starts.  The outcome is printed as one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import awaits
import plan

import nbd

IS_OURS = hasattr(nbd, "open")
#: Bytes in each pread of the loops that replace nbd.open with libnbd's own module.
LOOP = 256 * 1024


@dataclass(frozen=True)
class Job:
    """The parameters of a workload."""

    handles: Sequence[Any]
    operations: int
    size: int
    depth: int

    @property
    def handle(self) -> Any:
        """The first handle; most workloads have only one."""
        return self.handles[0]

    @property
    def offsets(self) -> range:
        """The offset of each operation."""
        return range(0, self.operations * self.size, self.size)


def check(error: Any) -> None:
    """Raise if a command failed."""
    if error.value:
        raise OSError(error.value, "the command failed")


def wait_below(h: Any, depth: int) -> None:
    """Wait until fewer than ``depth`` commands are in flight."""
    while h.aio_in_flight() >= depth:
        h.poll(-1)


def getter(job: Job) -> None:
    """Get the size of the export, which takes no round trip."""
    h = job.handle
    for _ in range(job.operations):
        h.get_size()


def debug_callback(job: Job) -> None:
    """Receive debug messages; libnbd sends two for each call."""
    h = job.handle
    characters = 0

    def message(context: str, text: str) -> None:
        nonlocal characters
        characters += len(text)

    h.set_debug_callback(message)
    h.set_debug(True)
    for _ in range(job.operations // 2):
        h.get_size()
    h.set_debug(False)
    h.clear_debug_callback()


def pread(job: Job) -> None:
    """Read, one command at a time."""
    h = job.handle
    for offset in job.offsets:
        h.pread(job.size, offset)


def pread_into(job: Job) -> None:
    """Read into one buffer, one command at a time; with libnbd's module, which cannot, pread."""
    h = job.handle
    if not hasattr(h, "pread_into"):
        return pread(job)
    buffer = nbd.Buffer(job.size)
    for offset in job.offsets:
        h.pread_into(buffer, offset)
    return None


def pwrite(job: Job) -> None:
    """Write, one command at a time."""
    h = job.handle
    data = b"w" * job.size
    for offset in job.offsets:
        h.pwrite(data, offset)


def aio_pread(job: Job) -> None:
    """Keep ``depth`` reads in flight, each with its own buffer and callback."""
    h = job.handle
    for offset in job.offsets:
        wait_below(h, job.depth)
        buffer = nbd.Buffer(job.size)

        def completed(error: Any, buffer: nbd.Buffer = buffer) -> int:
            check(error)
            return 1

        h.aio_pread(buffer, offset, completed)
    wait_below(h, 1)


def aio_pread_bytearray(job: Job) -> None:
    """Keep ``depth`` reads in flight into bytearrays that are reused."""
    h = job.handle
    free = [bytearray(job.size) for _ in range(job.depth)]
    for offset in job.offsets:
        while not free:
            h.poll(-1)
        buffer = free.pop()

        def completed(error: Any, buffer: bytearray = buffer) -> int:
            check(error)
            free.append(buffer)
            return 1

        h.aio_pread(buffer, offset, completed)
    wait_below(h, 1)


def aio_pwrite(job: Job) -> None:
    """Keep ``depth`` writes in flight."""
    h = job.handle
    data = b"w" * job.size

    def completed(error: Any) -> int:
        check(error)
        return 1

    for offset in job.offsets:
        wait_below(h, job.depth)
        h.aio_pwrite(data, offset, completed)
    wait_below(h, 1)


def threads(job: Job) -> None:
    """Read in one thread for each handle."""
    operations = job.operations // len(job.handles)
    shares = [replace(job, handles=[h], operations=operations) for h in job.handles]
    with ThreadPoolExecutor(len(shares)) as pool:
        for future in [pool.submit(pread, share) for share in shares]:
            future.result()


def handles(job: Job) -> None:
    """Create handles and drop them, which closes them; on PyPy, where that is late, close them."""
    finalizes_late = sys.implementation.name == "pypy"
    for _ in range(job.operations):
        h = nbd.NBD()
        if finalizes_late:
            h.close()
        del h


def fill(job: Job) -> None:
    """Write the contents of the first of each ``depth`` blocks."""
    for offset in job.offsets:
        place = offset * job.depth
        job.handle.pwrite(plan.contents(place, job.size, job.offsets.stop * job.depth), place)


def read_queued(h: Any, offsets: Sequence[int], size: int, depth: int) -> None:
    """Keep ``depth`` reads in flight with a queue, into buffers that are reused."""
    todo = iter(offsets)
    with nbd.queue.Queue(h, depth=depth) as queue:
        buffers = {queue.read(b, next(todo)): b for b in [nbd.Buffer(size) for _ in range(depth)]}
        while buffers:
            for request in queue.wait(depth // 4):
                if request.error is not None:
                    raise request.error
                buffer = buffers.pop(request)
                offset = next(todo, None)
                if offset is not None:
                    buffers[queue.read(buffer, offset)] = buffer


def queue(job: Job) -> None:
    """Keep ``depth`` reads in flight with a queue; with libnbd's module, with callbacks."""
    if not IS_OURS:
        return aio_pread_bytearray(job)
    return read_queued(job.handle, job.offsets, job.size, job.depth)


def file(job: Job) -> None:
    """Read a file sequentially; with libnbd's module, by larger preads."""
    if IS_OURS:
        with nbd.open(job.handle) as disk:
            for _ in range(job.operations):
                disk.read(job.size)
    else:
        for offset in range(0, job.operations * job.size, LOOP):
            job.handle.pread(LOOP, offset)


def awaited(job: Job) -> None:
    """Keep ``depth`` tasks awaiting a read; with libnbd's module, by callbacks."""
    awaits.read_all(job.handle.get_uri(), job.offsets, job.size, job.depth)


FUNCTIONS: tuple[Callable[[Job], None], ...] = (
    *(getter, debug_callback, pread, pread_into, pwrite, aio_pread, aio_pread_bytearray),
    *(aio_pwrite, threads, handles, fill, queue, file, awaited),
)
KINDS = {function.__name__.replace("_", "-"): function for function in FUNCTIONS}


def connect(uri: str) -> Any:
    """Return a connected handle."""
    h = nbd.NBD()
    h.connect_uri(uri)
    return h


def main(arguments: Sequence[str]) -> None:
    """Connect, warm up, run, and print the outcome."""
    kind, *numbers = arguments[:5]
    operations, warm_up, size, depth = map(int, numbers)
    job = Job([connect(uri) for uri in arguments[5:]], operations, size, depth)
    run = KINDS[kind]
    if warm_up:
        run(replace(job, operations=warm_up))
    wall, cpu = time.perf_counter(), time.process_time()
    run(job)
    outcome = {
        "operations": operations,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1:])
