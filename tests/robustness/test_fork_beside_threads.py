"""A process forks while another of its threads is inside a queue, a file or a copy.

The child lacks that thread, but inherits the locks that the thread held. Whatever the child does,
it never hangs, and the parent's work is not disturbed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
from support.figures import Figure
from support.forms import SOAK
from support.programs import run_program, run_silently
from support.servers import StartServer

FORKS = 300 if SOAK else 20

PROGRAM = """
import faulthandler, gc, multiprocessing, os, random, signal, sys, threading, warnings
import nbd, nbd.queue
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
warnings.filterwarnings("ignore", "unclosed", ResourceWarning)  # of a child that closes nothing
uri, folder, forks = sys.argv[1], sys.argv[2], int(sys.argv[3])
MIB = 1 << 20
parent = os.getpid()
is_over = False
failures = []
rounds = 0
begun = threading.Event()
expected = b"".join(number.to_bytes(8, "big") for number in range(0, MIB, 8))

def work():
    {work}

def fork():
    child = os.fork()
    if not child:
        signal.alarm(40)  # a child that hangs is killed
        faulthandler.dump_traceback_later(30)
        work()
        sys.exit()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child has ended with status {{status}}"

{state}

def repeat():
    global rounds
    try:
        while not is_over:
            once()
            rounds += 1
            begun.set()
    except BaseException as failure:
        failures.append(repr(failure))
        begun.set()
        raise

thread = threading.Thread(target=repeat)
thread.start()
begun.wait()
try:
    for number in range(forks):
        {forks}
        assert not failures, failures
finally:
    if os.getpid() == parent:
        is_over = True
        {over}
        thread.join()
{end}
assert not failures, failures
assert rounds
"""

STATES = {
    "Queue.wait": (
        """
handle = nbd.connect(uri)
thing = nbd.queue.Queue(handle)

def once():
    memory = [nbd.Buffer(4096) for _ in range(16)]
    requests = [thing.read(one, 4096 * number) for number, one in enumerate(memory)]
    while not all(request.is_done for request in requests):
        thing.wait()
    assert not any(request.error for request in requests)
    assert b"".join(bytes(one.to_bytearray()) for one in memory) == expected[:65536]
""",
        "thing.close(); handle.close()",
    ),
    "Queue.step": (
        """
import select
handle = nbd.connect(uri)
thing = nbd.queue.Queue(handle)

def once():
    memory = nbd.Buffer(65536)
    request = thing.read(memory, 65536)
    while not request.is_done:
        select.select([thing], [], [])
        thing.step()
    assert request.error is None
    assert bytes(memory.to_bytearray()) == expected[65536:131072]
""",
        "thing.close(); handle.close()",
    ),
    "a read of a file": (
        """
thing = nbd.open(uri, buffering=0)
handle = nbd.connect(uri)

def once():
    at = random.randrange(MIB - 100_000)
    thing.seek(at)
    data = thing.read(50_000)
    assert data and data == expected[at : at + len(data)]
""",
        "thing.close(); handle.close()",
    ),
    "a buffered read of a file": (
        """
thing = nbd.open(uri)
handle = nbd.connect(uri)

def once():
    thing.seek(0)
    assert thing.read() == expected
""",
        "thing.close(); handle.close()",
    ),
    "a copy": (
        """
handle = nbd.connect(uri)
thing = nbd.queue.Queue(handle)

def once():
    nbd.copy(uri, folder + "/copy")
    with open(folder + "/copy", "rb") as file:
        assert file.read() == expected
""",
        "thing.close(); handle.close()",
    ),
    "a copy to a stream": (
        """
import io
handle = nbd.connect(uri)
thing = io.BytesIO()

def once():
    target = io.BytesIO()
    nbd.copy(handle, target)
    assert target.getvalue() == expected
""",
        "thing.close(); handle.close()",
    ),
    "an event loop": (
        """
import asyncio
import nbd.aio
handle = nbd.connect(uri)
thing = nbd.queue.Queue(handle)

async def main():
    async with nbd.aio.connect(uri) as disk:
        for _ in range(4):
            data = await asyncio.gather(*(disk.pread(4096, 4096 * n) for n in range(16)))
            assert b"".join(data) == expected[:65536]

def once():
    asyncio.run(main())
""",
        "thing.close(); handle.close()",
    ),
}

WRITES = (
    """
thing = nbd.open(uri, "r+b", buffering={buffering})
handle = nbd.connect(uri)
written = 0

def once():
    global written
    written += 1
    data = bytes([written % 255 + 1]) * 65536
    thing.seek(0)
    thing.write(data)
    if written % 3 == 0:
        thing.flush()
    thing.seek(0)
    assert thing.read(65536) == data
""",
    """thing.close()
assert handle.pread(65536, 0) == bytes([written % 255 + 1]) * 65536
handle.close()
""",
)

WORK = {
    "ends at once": "os._exit(0)",
    "runs exit functions": "pass",
    "closes it": "thing.close(); os._exit(0)",
    "closes it and runs exit functions": "thing.close()",
    "closes the handle": "handle.close()",
    "closes everything": "thing.close(); handle.close()",
    "drops it": "global thing, handle; del thing, handle; gc.collect()",
}
#: These three are nearly the same as the others.
SHORT = ("runs exit functions", "closes everything", "drops it")
FORK = "fork()"
PROCESS = """process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(20)
        assert process.exitcode == 0, process.exitcode"""

WORKS = {name: work for name, work in WORK.items() if SOAK or name in SHORT}
every_work = pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
Run = Callable[..., None]


@pytest.fixture
def run(figure: Figure, tmp_path: Path) -> Run:
    """Run a program that forks; it must succeed and print nothing."""

    def run(state: str, end: str, work: str, uri: str, forks: str = FORK) -> None:
        program = PROGRAM.format(state=state, end=end, work=work, forks=forks, over="pass")
        run_silently(program, uri, str(tmp_path), str(FORKS))
        figure("forks beside a thread that waits", FORKS)

    return run


@every_work
@pytest.mark.parametrize("state", STATES)
def test_a_child_does_not_hang_and_its_parent_reads_on(
    nbdkit: StartServer, run: Run, state: str, work: str
) -> None:
    run(*STATES[state], work, nbdkit("pattern", "1M", "--threads=4").uri)


@every_work
@pytest.mark.parametrize("buffering", [0, -1])
def test_a_child_does_not_hang_and_its_parent_writes_on(
    nbdkit: StartServer, run: Run, buffering: int, work: str
) -> None:
    state, end = WRITES
    run(state.format(buffering=buffering), end, work, nbdkit("memory", "1M", "--threads=4").uri)


@pytest.mark.parametrize("state", STATES)
def test_a_process_of_multiprocessing_ends(nbdkit: StartServer, run: Run, state: str) -> None:
    run(*STATES[state], "pass", nbdkit("pattern", "1M", "--threads=4").uri, PROCESS)


# The server is paused, so that the thread is inside the wait at each fork.
HUNG = """
server = int(sys.argv[2])
{state}
def once():
    os.kill(server, signal.SIGSTOP)
    begun.set()
    {call}
"""
HANGS = {
    "Queue.wait": (
        "handle = nbd.connect(uri); thing = nbd.queue.Queue(handle)",
        "thing.read(nbd.Buffer(512), 0); thing.wait(2)",
    ),
    "a read of a file": (
        "thing = nbd.open(uri, buffering=0); handle = nbd.connect(uri)",
        "thing.seek(0); assert thing.read(512) == bytes(512)",
    ),
    "a buffered read of a file": (
        "thing = nbd.open(uri); handle = nbd.connect(uri)",
        "thing.seek(0); assert thing.read(512) == bytes(512)",
    ),
    "a flush of a file": (
        'thing = nbd.open(uri, "r+b"); handle = nbd.connect(uri)',
        "thing.seek(0); thing.write(bytes(4096)); thing.flush()",
    ),
}
SLEEPING = """import time
        time.sleep(0.002)  # sometimes the thread is not inside yet, which does no harm
        fork()"""


@every_work
@pytest.mark.parametrize("state", HANGS)
def test_a_child_does_not_hang_where_the_server_does(
    nbdkit: StartServer, figure: Figure, state: str, work: str
) -> None:
    server = nbdkit("memory", "1M", "--threads=4")
    made, call = HANGS[state]
    end = "thing.close(); handle.close()"
    program = PROGRAM.format(
        state=HUNG.format(state=made, call=call),
        end=end,
        work=work,
        forks=SLEEPING,
        over="os.kill(server, signal.SIGCONT)",
    )
    done = run_program(program, server.uri, str(server.process.pid), str(FORKS))
    server.resume()
    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, "")
