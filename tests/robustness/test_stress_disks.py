"""Many threads on queues, files, copies and event loops: each byte is right, and none is lost.

Without the GIL the threads run at the same time; with it they switch as often as possible.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import pytest
from support.figures import Figure
from support.forms import SOAK
from support.programs import run_silently
from support.servers import TIMEOUT, StartServer
from support.sizes import KIB, MIB
from support.threads import THREADS, in_threads, stress

import nbd
import nbd.aio
import nbd.queue

BLOCK = 4 * KIB
PART = 64 * KIB  # of the disk, for each thread
PROGRAMS = 40 if SOAK else 2  # runs of a program


def test_threads_submit_to_one_queue_and_each_request_is_returned_once(
    disk: nbd.NBD, figure: Figure
) -> None:
    queue = nbd.queue.Queue(disk, depth=16)
    submitted: list[list[nbd.queue.Request]] = [[] for _ in range(THREADS)]
    returned: list[list[nbd.queue.Request]] = [[] for _ in range(THREADS)]

    def work(number: int, turn: int) -> None:
        data, back = bytes([number, turn % 256]) * (BLOCK // 2), bytearray(BLOCK)
        for request in (queue.write, queue.read):
            # The second argument is a multiple of PART, so no two threads touch one block.
            mine = request(data if request == queue.write else back, number * PART)
            submitted[number].append(mine)
            while not mine.is_done:
                returned[number] += queue.wait(1, 0.01)
        assert back == data

    done = stress(work)
    rest = queue.wait(1)
    queue.close()
    count = 2 * done
    figure("stress: requests of one queue", count)
    ids = [id(one) for part in (*returned, rest) for one in part]
    assert sorted(ids) == sorted(id(one) for part in submitted for one in part)


def test_a_queue_is_closed_while_threads_use_it(disk: nbd.NBD, figure: Figure) -> None:
    shared = [nbd.queue.Queue(disk)]

    def work(number: int, turn: int) -> None:
        queue = shared[0]
        if number == 0:
            shared[0] = nbd.queue.Queue(disk)
            queue.close()
            return
        with suppress(ValueError):  # it is closed
            queue.read(bytearray(BLOCK), 0)
            queue.wait(1, 0.01)

    figure("stress: calls while queues were closed", stress(work))
    shared[0].close()


def test_threads_that_read_one_file_in_order_take_each_block_once(
    nbdkit: StartServer, figure: Figure
) -> None:
    uri = nbdkit("pattern", "4M").uri  # its data names its offset, so every block differs
    with nbd.open(uri) as file:
        whole = [file.read(BLOCK) for _ in range(4 * MIB // BLOCK)]

    def read_all() -> int:
        taken: list[list[bytes]] = [[] for _ in range(THREADS)]
        with nbd.open(uri) as file:

            def work(number: int) -> None:
                while True:
                    data = file.read(BLOCK)
                    if not data:
                        return
                    taken[number].append(data)

            in_threads(work)
        found = sorted(data for part in taken for data in part)
        assert found == sorted(whole)
        return len(found)

    figure("stress: blocks that threads read from one file", sum(read_all() for _ in range(3)))


def test_a_file_is_closed_while_threads_use_it(nbdkit: StartServer, figure: Figure) -> None:
    uri = nbdkit("memory", "1M").uri
    shared = [nbd.open(uri, "r+b")]

    def work(number: int, turn: int) -> None:
        file = shared[0]
        if number == 0:
            shared[0] = nbd.open(uri, "r+b")
            file.close()
            return
        with suppress(ValueError, nbd.Error):  # it is closed
            file.seek(number * PART)
            file.write(bytes(BLOCK))
            file.seek(number * PART)
            file.read(BLOCK)

    figure("stress: calls while files were closed", stress(work))
    shared[0].close()


def test_copies_in_threads_are_equal_to_their_sources(
    nbdkit: StartServer, tmp_path: Path, figure: Figure
) -> None:
    uri = nbdkit("pattern", "4M").uri
    with nbd.open(uri) as file:
        expected = file.read()

    def work(number: int, turn: int) -> None:
        target = tmp_path / str(number)
        target.unlink(missing_ok=True)
        copied = nbd.copy(uri, target, connections=2)
        assert sum(copied) == len(expected)
        assert target.read_bytes() == expected

    figure("stress: copies in threads", stress(work, count=4))


def test_event_loops_in_threads(nbdkit: StartServer, figure: Figure) -> None:
    uri = nbdkit("memory", "1M").uri

    async def use(number: int, turn: int) -> None:
        async with nbd.aio.connect(uri) as disk:
            data = [bytes([number, turn % 256, at]) * 512 for at in range(8)]
            at = range(number * PART, number * PART + 8 * 1536, 1536)
            await asyncio.gather(*(disk.pwrite(d, where) for d, where in zip(data, at)))
            assert await asyncio.gather(*(disk.pread(1536, where) for where in at)) == data

    figure("stress: clients in event loops of threads", stress(lambda n, t: asyncio.run(use(n, t))))


def test_a_handle_may_be_dropped_in_another_thread(nbdkit: StartServer, figure: Figure) -> None:
    socket = nbdkit("memory", "1M").socket
    passed: SimpleQueue[nbd.NBD] = SimpleQueue()

    def work(number: int, turn: int) -> None:
        handle = nbd.NBD()
        handle.connect_unix(socket)
        passed.put(handle)
        del handle
        assert passed.get(timeout=TIMEOUT).pread(512, 0) == bytes(512)

    figure("stress: handles passed to other threads", stress(work))


IMPORTS = """
import threading
start = threading.Barrier(8)
failures = []
def work():
    try:
        start.wait(20)
        import nbd
        assert nbd.NBD().aio_is_created()
        assert nbd.open and nbd.copy and nbd.aio.connect and nbd.queue.Queue and nbd.__version__
    except BaseException as reason:
        failures.append(reason)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
"""


def test_threads_import_the_package_at_the_same_time() -> None:
    for _ in range(PROGRAMS):
        run_silently(IMPORTS)


EXIT = """
import sys, threading
import nbd
h = nbd.NBD()
h.connect_unix(sys.argv[1])
thread = threading.Thread(target=h.pread, args=(512, 0))
thread.start()
thread.join()
"""


@pytest.mark.parametrize("name", ["h", "file", "queue", "cycle"])
def test_a_program_that_had_a_thread_exits_silently(nbdkit: StartServer, name: str) -> None:
    kept = {
        "h": "",
        "file": "import nbd._disks; file = nbd.open(f'nbd+unix:///?socket={sys.argv[1]}', 'r+b');"
        "\nfile.write(b'data'); file.flush(); file.close(); del file",
        "queue": "queue = nbd.queue.Queue(h); queue.read(bytearray(512), 0)",
        "cycle": "h.myself = [h]",
    }
    socket = nbdkit("memory", "1M").socket
    for _ in range(PROGRAMS):
        run_silently(EXIT + kept[name], socket)


def test_the_gil_stays_disabled() -> None:
    # Where there is no GIL, importing an extension module that needs it would enable it.
    run_silently("""
import sys
enabled = getattr(sys, "_is_gil_enabled", lambda: True)
before = enabled()
import threading, nbd, nbd.aio, nbd.queue, nbd.memory
nbd.open, nbd.copy, nbd.connect, nbd.extents
assert enabled() == before
""")


def test_threads_of_a_stress_test_run_beside_each_other() -> None:
    names: set[int] = set()
    assert stress(lambda number, turn: names.add(threading.get_ident())) > THREADS
    assert len(names) == THREADS
