# SPDX-License-Identifier: LGPL-2.0-or-later
"""The workloads in Python: the program that ``run.py`` starts in each interpreter.

Usage: workloads.py KIND OPERATIONS WARM-UP SIZE DEPTH [URI...]

The loops are what a user of libnbd's own module would write, and use nothing that it lacks, so
that one source serves every subject.  What only this package has is compared with what its users
would write otherwise.  One handle is connected for each URI before the clock starts.  The outcome
is one JSON object on standard output.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import awaits

import nbd

EXTENTS = 100_000
IS_OURS = hasattr(nbd, "open")
#: What one pread of a loop reads where libnbd's own module has no file.
LOOP = 256 * 1024


@dataclass(frozen=True)
class Job:
    """What a workload is given: its connected handles and its numbers."""

    handles: Sequence[Any]
    operations: int
    size: int
    depth: int

    @property
    def handle(self) -> Any:
        """The only handle of most workloads."""
        return self.handles[0]

    @property
    def offsets(self) -> range:
        """Where each operation reads or writes."""
        return range(0, self.operations * self.size, self.size)


def check(error: Any) -> None:
    """Stop the run if a command failed."""
    if error.value:
        raise OSError(error.value, "the command failed")


def wait_for_room(h: Any, depth: int) -> None:
    """Wait until fewer than ``depth`` commands are in flight."""
    while h.aio_in_flight() >= depth:
        h.poll(-1)


def getter(job: Job) -> None:
    """Ask for the size of the export, which needs no round trip."""
    h = job.handle
    for _ in range(job.operations):
        h.get_size()


def debug_callback(job: Job) -> None:
    """Receive debug messages: every call into libnbd makes two."""
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
    """Read into one buffer, one command at a time; libnbd's module can only pread."""
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
    """Keep ``depth`` reads in flight, each with a buffer and a callback of its own."""
    h = job.handle
    for offset in job.offsets:
        wait_for_room(h, job.depth)
        buffer = nbd.Buffer(job.size)

        def completed(error: Any, buffer: nbd.Buffer = buffer) -> int:
            check(error)
            return 1

        h.aio_pread(buffer, offset, completed)
    wait_for_room(h, 1)


def aio_pread_bytearray(job: Job) -> None:
    """Keep ``depth`` reads in flight into bytearrays that are used again."""
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
    wait_for_room(h, 1)


def aio_pwrite(job: Job) -> None:
    """Keep ``depth`` writes in flight."""
    h = job.handle
    data = b"w" * job.size

    def completed(error: Any) -> int:
        check(error)
        return 1

    for offset in job.offsets:
        wait_for_room(h, job.depth)
        h.aio_pwrite(data, offset, completed)
    wait_for_room(h, 1)


def pread_structured(job: Job) -> None:
    """Read with a callback for each chunk that arrives."""
    h = job.handle
    received = 0

    def chunk(data: Any, offset: int, status: int, error: Any) -> None:
        nonlocal received
        check(error)
        received += len(data)

    for offset in job.offsets:
        h.pread_structured(job.size, offset, chunk)
    if received != job.operations * job.size:
        raise RuntimeError(f"received {received} bytes instead of {job.operations * job.size}")


def block_status(job: Job) -> None:
    """Ask for the extents of an export that has many, in one command."""
    h = job.handle
    found = 0

    def extent(context: str, offset: int, entries: list[int], error: Any) -> None:
        nonlocal found
        check(error)
        found += len(entries) // 2

    count = h.get_size()
    for _ in range(job.operations):
        h.block_status(count, 0, extent)
    if found != job.operations * EXTENTS:
        raise RuntimeError(f"received {found} extents instead of {job.operations * EXTENTS}")


def threads(job: Job) -> None:
    """Read in as many threads as there are handles, each with a handle of its own."""
    operations = job.operations // len(job.handles)
    shares = [replace(job, handles=[h], operations=operations) for h in job.handles]
    with ThreadPoolExecutor(len(shares)) as pool:
        for future in [pool.submit(pread, share) for share in shares]:
            future.result()


def create_and_close(job: Job) -> None:
    """Create handles and drop them, which closes them; PyPy, which drops late, calls close."""
    drops_late = sys.implementation.name == "pypy"
    for _ in range(job.operations):
        h = nbd.NBD()
        if drops_late:
            h.close()
        del h


def dispatch(h: Any, events: int) -> None:
    """Tell libnbd what poll(2) has found out about its socket."""
    direction = h.aio_get_direction()
    if events & (select.POLLIN | select.POLLHUP) and direction & nbd.AIO_DIRECTION_READ:
        h.aio_notify_read()
    elif events & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
        h.aio_notify_write()


def wait_for_any(handles: Sequence[Any]) -> None:
    """Wait until one of the handles can go on, and let it."""
    poller = select.poll()
    by_fd = {h.aio_get_fd(): h for h in handles}
    for fd, h in by_fd.items():
        direction = h.aio_get_direction()
        wanted = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
        wanted |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
        poller.register(fd, wanted)
    for fd, events in poller.poll():
        dispatch(by_fd[fd], events)


def copy(job: Job) -> None:
    """Copy from one server to another with ``depth`` blocks on their way."""
    source, target = job.handles
    todo = deque(job.offsets)
    arrived: deque[tuple[int, nbd.Buffer]] = deque()
    on_their_way = 0

    def write_completed(error: Any) -> int:
        nonlocal on_their_way
        check(error)
        on_their_way -= 1
        return 1

    while todo or on_their_way:
        while todo and on_their_way < job.depth:
            buffer, start = nbd.Buffer(job.size), todo.popleft()

            def read_completed(error: Any, buffer: nbd.Buffer = buffer, start: int = start) -> int:
                check(error)
                arrived.append((start, buffer))
                return 1

            source.aio_pread(buffer, start, read_completed)
            on_their_way += 1
        while arrived:
            start, buffer = arrived.popleft()
            target.aio_pwrite(buffer, start, write_completed)
        wait_for_any(job.handles)


def fill(job: Job) -> None:
    """Write blocks that all differ, each ``depth`` blocks after the last one."""
    for offset in job.offsets:
        place = offset * job.depth
        job.handle.pwrite(
            random.Random(place).getrandbits(8 * job.size).to_bytes(job.size, "big"), place
        )


def read_queued(h: Any, offsets: Sequence[int], size: int, depth: int) -> None:
    """Keep ``depth`` reads in flight with a queue, into buffers that are used again."""
    todo = iter(offsets)
    with nbd.queue.Queue(h, depth=depth) as queue:
        buffers = {queue.read(b, next(todo)): b for b in [nbd.Buffer(size) for _ in range(depth)]}
        while buffers:
            for request in queue.wait(depth // 4):
                check_request(request)
                buffer = buffers.pop(request)
                offset = next(todo, None)
                if offset is not None:
                    buffers[queue.read(buffer, offset)] = buffer


def check_request(request: Any) -> None:
    """Stop the run if a request of a queue has failed."""
    if request.error is not None:
        raise request.error


def queue(job: Job) -> None:
    """Keep ``depth`` reads in flight with a queue; with libnbd's module, with callbacks."""
    if not IS_OURS:
        return aio_pread_bytearray(job)
    return read_queued(job.handle, job.offsets, job.size, job.depth)


def random_reads(job: Job) -> None:
    """Read in random places with a queue; with libnbd's module, in as many threads as handles."""
    offsets = list(job.offsets)
    random.Random(1).shuffle(offsets)
    if IS_OURS:
        return read_queued(job.handle, offsets, job.size, job.depth)

    def read(number: int) -> None:
        h = job.handles[number]
        for offset in offsets[number :: len(job.handles)]:
            h.pread(job.size, offset)

    with ThreadPoolExecutor(len(job.handles)) as pool:
        list(pool.map(read, range(len(job.handles))))
    return None


def file(job: Job) -> None:
    """Read in order from a file; with libnbd's module, a larger pread at a time."""
    end = job.operations * job.size
    if IS_OURS:
        with nbd.open(job.handle) as disk:
            while disk.tell() < end:
                disk.read(job.size)
    else:
        for offset in range(0, end, LOOP):
            job.handle.pread(LOOP, offset)


def checksum(job: Job) -> None:
    """Hash the contents of a disk; with libnbd's module, with a pread at a time."""
    digest = hashlib.sha256()
    end = job.operations * job.size
    if IS_OURS:
        with nbd.open(job.handle) as disk:
            left = end
            while left:
                data = disk.read(min(job.size, left))
                digest.update(data)
                left -= len(data)
    else:
        for offset in range(0, end, LOOP):
            digest.update(job.handle.pread(LOOP, offset))


def awaited(job: Job) -> None:
    """Keep ``depth`` tasks awaiting a read; with libnbd's module, over callbacks."""
    awaits.read_all(job.handle.get_uri(), job.offsets, job.size, job.depth, is_uvloop=False)


def awaited_in_uvloop(job: Job) -> None:
    """The same in uvloop's event loop."""
    awaits.read_all(job.handle.get_uri(), job.offsets, job.size, job.depth, is_uvloop=True)


KINDS: dict[str, Callable[[Job], None]] = {
    "getter": getter,
    "debug-callback": debug_callback,
    "pread": pread,
    "pread-into": pread_into,
    "pwrite": pwrite,
    "aio-pread": aio_pread,
    "aio-pread-bytearray": aio_pread_bytearray,
    "aio-pwrite": aio_pwrite,
    "pread-structured": pread_structured,
    "block-status": block_status,
    "threads": threads,
    "handles": create_and_close,
    "copy": copy,
    "fill": fill,
    "queue": queue,
    "random": random_reads,
    "file": file,
    "checksum": checksum,
    "await": awaited,
    "await-uvloop": awaited_in_uvloop,
}


def connect(uri: str) -> Any:
    """A handle that can also answer block_status."""
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    return h


def main(arguments: Sequence[str]) -> None:
    """Connect, warm up, run and report."""
    kind, *numbers = arguments[:5]
    operations, warm_up, size, depth = map(int, numbers)
    handles = [connect(uri) for uri in arguments[5:]]
    job = Job(handles, operations, size, depth)
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
    usage = resource.getrusage(resource.RUSAGE_SELF)
    outcome |= {"max_rss_kib": usage.ru_maxrss, "page_faults": usage.ru_minflt}
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1:])
