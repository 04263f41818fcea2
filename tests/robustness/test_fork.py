"""A child process that uses inherited handles does not disturb its parent.

Parent and child share the connection, and the child has none of the parent's other threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
from support.figures import Figure
from support.forms import SOAK
from support.programs import run_silently
from support.servers import StartServer, answers_on_command

RUNS = 20 if SOAK else 1

Forks = Callable[..., None]

PROGRAM = """
import gc, nbd, os, sys, threading, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
arguments = sys.argv[1:]

def connected():
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    if arguments[1:]:
        h.set_tls(nbd.TLS_REQUIRE)
        h.set_tls_username("alice")
        h.set_tls_psk_file(arguments[1])
    h.connect_unix(arguments[0])
    return h

def work():
    {work}

def fork():
    child = os.fork()
    if not child:
        work()
        sys.exit()
    status = os.waitpid(child, 0)[1]
    assert status == 0, status

{state}
"""

WORK = {
    "ends": "pass",
    "ends at once": "os._exit(0)",
    "closes": "h.close()",
    "drops": "global h; del h; gc.collect()",
    "connects anew": "assert len(connected().pread(4096, 0)) == 4096",
}

IDLE = """
h = connected()
h.pwrite(b"x" * 4096, 0)
fork()
assert h.pread(4096, 0) == b"x" * 4096
h.shutdown()
"""

IN_FLIGHT = """
h = connected()
h.pwrite(b"x" * 4096, 0)
buffers = [bytearray(4096) for i in range(16)]
errors = []

def completion(error):
    errors.append(error.value)
    return 1

for buffer in buffers:
    h.aio_pread(buffer, 0, completion)
    h.aio_block_status(4096, 0, lambda *extent: None, completion)
fork()
assert not errors
while h.aio_in_flight():
    h.poll(-1)
assert errors == [0] * 32
assert all(buffer == b"x" * 4096 for buffer in buffers)
h.shutdown()
"""

# The server answers a read when it is told to, through two named pipes; until then a thread of the
# parent is inside the call.
WAITING = """
asked, go = arguments.pop(), arguments.pop()
h = connected()
result = []
thread = threading.Thread(target=lambda: result.append(h.pread(4096, 0)))
thread.start()
with open(asked) as pipe:
    pipe.read()
fork()
assert not result
with open(go, "w") as pipe:
    pipe.write("go\\n")
thread.join()
assert result == [bytes(4096)]
"""


@pytest.fixture
def forks(figure: Figure) -> Forks:
    """Run a program that forks; it must exit with status 0 and print nothing."""

    def run(state: str, work: str, *arguments: str) -> None:
        program = PROGRAM.format(state=state, work=work)
        for _ in range(RUNS):
            run_silently(program, *arguments)
        figure("forks: children that left the connection to their parent", RUNS)

    return run


every_work = pytest.mark.parametrize("work", WORK.values(), ids=WORK)


@every_work
def test_child_of_an_idle_connection(nbdkit: StartServer, forks: Forks, work: str) -> None:
    forks(IDLE, work, nbdkit("memory", "1M").socket)


@every_work
def test_child_of_an_encrypted_connection(
    nbdkit: StartServer, forks: Forks, psk: Path, work: str
) -> None:
    forks(IDLE, work, nbdkit("memory", "1M", tls="require", psk=psk).socket, str(psk))


@every_work
def test_child_of_a_connection_with_commands_in_flight(
    nbdkit: StartServer, forks: Forks, work: str
) -> None:
    forks(IN_FLIGHT, work, nbdkit("memory", "1M").socket)


@pytest.mark.parametrize("work", ["pass", WORK["closes"], WORK["drops"]])
def test_child_while_another_thread_is_inside_a_call(
    nbdkit: StartServer, forks: Forks, tmp_path: Path, work: str
) -> None:
    plugin, asked, go = answers_on_command(tmp_path)
    forks(WAITING, work, nbdkit(*plugin).socket, str(go), str(asked))
