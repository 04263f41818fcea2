"""close() closes file descriptors at once, and running out of them is an error that says so.

Each program has a low limit for descriptors. It collects no garbage: on PyPy, a descriptor that
only a collection closes would make a loop run out of descriptors.
"""

from __future__ import annotations

from typing import Callable

import pytest
from support.forms import SOAK
from support.programs import run_program, run_silently
from support.servers import StartServer

ROUNDS = 3000 if SOAK else 300
COPIES = ROUNDS // 3  # they take longer

COMMON = """
import asyncio, atexit, errno, gc, io, os, resource, sys, nbd, nbd.aio, nbd.queue
uri, target, folder, rounds = *sys.argv[1:4], int(sys.argv[4])
gc.disable()  # PyPy runs no finalizers then

def limit(number):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def connect():
    nbd.connect(uri).close()

def connect_to_a_command():
    nbd.connect(["nbdkit", "-s", "--exit-with-parent", "null", "1M"]).close()

def open_and_read():
    with nbd.open(uri) as file:
        assert len(file.read(10)) == 10

def open_and_write():
    with nbd.open(target, "r+b", buffering=0) as file:
        file.write(b"x" * 1000)

def open_over_a_handle():
    with nbd.open(handle, "r+b") as file:
        file.write(b"x" * 1000)

def make_a_queue():
    with nbd.queue.Queue(handle) as queue:
        queue.read(nbd.Buffer(512), 0)
        assert not queue.wait()[0].error

def watch_a_queue():
    with nbd.queue.Queue(handle) as queue:
        queue.fileno()
        request = queue.read(nbd.Buffer(512), 0)
        while not request.is_done:
            queue.step()

def close_a_queue_with_reads_in_flight():
    with nbd.connect(uri) as one, nbd.queue.Queue(one) as queue:
        queue.fileno()
        for _ in range(8):
            queue.read(nbd.Buffer(512), 0)
        queue.wait(1, 0)

def copy_to_a_file():
    nbd.copy(uri, folder + "/copy", connections=2)

def copy_to_a_disk():
    nbd.copy(uri, target)

def copy_to_a_stream():
    nbd.copy(uri, io.BytesIO())

def copy_from_a_stream():
    nbd.copy(io.BytesIO(b"x" * 100_000), target)

def copy_that_fails():
    with io.BytesIO() as closed:
        pass
    try:
        nbd.copy(uri, closed)
    except ValueError:
        return
    raise AssertionError("it was copied")

def in_loop(coroutine):
    def run():
        loop.run_until_complete(coroutine())
    run.__name__ = coroutine.__name__
    return run

@in_loop
async def aio_connect():
    async with nbd.aio.connect(uri, connections=2) as disk:
        assert len(await disk.pread(10, 0)) == 10

@in_loop
async def aio_copy():
    await nbd.aio.copy(uri, folder + "/copy")

@in_loop
async def aio_copy_of_a_client():
    async with nbd.aio.connect(uri) as disk:
        await nbd.aio.copy(disk, target)

@in_loop
async def aio_connect_in_vain():
    try:
        await nbd.aio.connect("nbd+unix:///?socket=/nonexistent")
    except nbd.Error as reason:
        assert reason.errnum == errno.ENOENT, reason
    else:
        raise AssertionError("it was connected")

loop = asyncio.new_event_loop()
atexit.register(loop.close)
handle = nbd.connect(target)
once = globals()[sys.argv[5]]
once()
gc.collect()
nbd.NBD().close()  # the shim's memory of collected handles is freed when the next one is made
before = descriptors()
"""

LOOP = (
    COMMON
    + """
limit(max(64, before + 30))
for number in range(rounds):
    once()
    assert descriptors() == before, f"round {number}: {descriptors()} and not {before}"
"""
)

EXHAUSTED = (
    COMMON
    + """
limit(64)
for free in (0, 1, 2, 3, 4, 5, 6, 8):
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for _ in range(free):
        os.close(taken.pop())
    try:
        once()
    except (OSError, nbd.Error) as reason:
        number = getattr(reason, "errnum", 0) or reason.errno
        assert number == errno.EMFILE, f"{free} free: {reason!r}"
    except BaseException as reason:
        for fd in taken:
            os.close(fd)
        raise AssertionError(f"{free} free: {reason!r}") from reason
    for fd in taken:
        os.close(fd)
    for _ in range(3):
        gc.collect()
    nbd.NBD().close()
    assert descriptors() == before, f"{free} free: {descriptors()} and not {before}"
    once()
    gc.collect()
"""
)

LOOPS = [
    "connect",
    "open_and_read",
    "open_and_write",
    "open_over_a_handle",
    "make_a_queue",
    "watch_a_queue",
    "close_a_queue_with_reads_in_flight",
    "copy_to_a_file",
    "copy_to_a_disk",
    "copy_to_a_stream",
    "copy_from_a_stream",
    "copy_that_fails",
    "aio_connect",
    "aio_copy",
    "aio_copy_of_a_client",
    "aio_connect_in_vain",
]
NEEDING = [
    "connect",
    "connect_to_a_command",
    "open_and_read",
    "open_over_a_handle",
    "make_a_queue",
    "watch_a_queue",
    "copy_to_a_file",
    "copy_to_a_disk",
    "copy_from_a_stream",
    "copy_to_a_stream",
    "aio_connect",
    "aio_copy",
    "aio_copy_of_a_client",
]


@pytest.fixture
def run(nbdkit: StartServer, tmp_path: object) -> Callable[[str, str], None]:
    """Run a program with one of the functions; it must succeed and print nothing."""
    source, target = nbdkit("pattern", "1M"), nbdkit("memory", "1M")

    def run(program: str, once: str) -> None:
        rounds = COPIES if "copy" in once else ROUNDS
        run_silently(program, source.uri, target.uri, str(tmp_path), str(rounds), once)

    return run


@pytest.mark.parametrize("once", LOOPS)
def test_closing_closes_every_descriptor_at_once(
    run: Callable[[str, str], None], once: str
) -> None:
    run(LOOP, once)


@pytest.mark.parametrize("once", NEEDING)
def test_no_descriptor_left_is_an_error_that_says_so(
    run: Callable[[str, str], None], once: str
) -> None:
    run(EXHAUSTED, once)


DESCRIPTORS = """
import asyncio, gc, nbd, resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
gc.disable()

async def main():
    for _ in range(100):
        disk = await nbd.aio.connect(sys.argv[1], connections=2)
        assert await disk.pread(512, 0) == bytes(512)
        await disk.close()

asyncio.run(main())
for _ in range(100):
    h = nbd.connect(sys.argv[1])
    h.close()
print("all")
"""


def test_closed_clients_keep_no_descriptor_until_garbage_is_collected(nbdkit: StartServer) -> None:
    done = run_program(DESCRIPTORS, nbdkit("memory", "1M").uri)
    assert (done.stdout, done.stderr) == ("all\n", "")


NO_DESCRIPTORS = """
import asyncio, errno, nbd, os, resource, sys

async def main(uri):
    async with nbd.aio.connect(uri):
        pass
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    for free in range(8):
        try:
            async with nbd.aio.connect(uri):
                print("connected")
                break
        except (OSError, nbd.Error) as reason:
            assert (reason.errno in (errno.EMFILE, "EMFILE")), repr(reason)
        os.close(taken.pop())
        after = os.dup(taken[0])
        os.close(after)

asyncio.run(main(sys.argv[1]))
"""


def test_no_descriptor_left_is_emfile(nbdkit: StartServer) -> None:
    done = run_program(NO_DESCRIPTORS, nbdkit("memory", "1M").uri)
    assert (done.stdout, done.stderr) == ("connected\n", "")
