"""A program exits with status 0 and nothing on stderr, in whatever state its handles are."""

from __future__ import annotations

from typing import Callable

import pytest
from support.figures import Figure
from support.forms import SOAK
from support.programs import run_program
from support.servers import StartServer

RUNS = 100 if SOAK else 1

Ending = Callable[..., None]

DISK = "memory", "1M"
STUCK = "memory", "1M", "--filter=delay", "rdelay=600", "wdelay=600"


@pytest.fixture
def ends(figure: Figure) -> Ending:
    """Run a program, which must exit with status 0 and print nothing: ends(program, argument)."""

    def run(program: str, *arguments: str) -> None:
        done = [run_program(program, *arguments) for _ in range(RUNS)]
        wrong = [one for one in done if (one.returncode, one.stdout, one.stderr) != (0, "", "")]
        figure("exits: programs", RUNS)
        figure("exits: programs with another status than 0, or output", len(wrong))
        assert wrong == []

    return run


def test_with_an_open_connection(nbdkit: StartServer, ends: Ending) -> None:
    program = "import nbd, sys; h = nbd.NBD(); h.connect_unix(sys.argv[1]); h.pread(512, 0)"
    ends(program, nbdkit(*DISK).socket)


def test_an_open_connection_is_closed(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M", "--filter=exitlast")
    program = "import nbd, sys; h = nbd.NBD(); h.connect_unix(sys.argv[1])"
    assert run_program(program, server.socket).returncode == 0
    assert server.wait() == 0


def test_with_commands_in_flight(nbdkit: StartServer, ends: Ending) -> None:
    program = """
import nbd, sys
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_unix(sys.argv[1])
for i in range(8):
    h.aio_pread(nbd.Buffer(4096), 0, lambda error: 1)
    h.aio_pread_structured(bytearray(4096), 0, lambda *chunk: 0)
    h.aio_pwrite(bytes(4096), 0)
    h.aio_block_status(4096, 0, lambda *extent: h)
"""
    ends(program, nbdkit(*STUCK).socket)


def test_with_commands_in_flight_whose_callbacks_fail(nbdkit: StartServer, ends: Ending) -> None:
    # libnbd 1.22 and later call a completion again when its handle is closed.
    program = """
import nbd, sys
def fail(error):
    if h.aio_is_ready():
        raise ValueError
h = nbd.NBD()
h.connect_unix(sys.argv[1])
for i in range(8):
    h.aio_pread(bytearray(4096), 0, lambda error: -1)
"""
    ends(program, nbdkit(*STUCK).socket)


def test_with_a_command_that_is_done_and_not_retired(nbdkit: StartServer, ends: Ending) -> None:
    program = """
import nbd, sys
h = nbd.NBD()
h.connect_unix(sys.argv[1])
h.aio_pread(bytearray(4096), 0, lambda error: 0)
while h.aio_in_flight():
    h.poll(-1)
"""
    ends(program, nbdkit(*DISK).socket)


def test_during_the_handshake(nbdkit: StartServer, ends: Ending) -> None:
    program = """
import nbd, sys
h = nbd.NBD()
h.aio_connect_unix(sys.argv[1])
h.poll(-1)
"""
    ends(program, nbdkit(*DISK).socket)


def test_with_a_handle_that_was_never_connected(ends: Ending) -> None:
    ends("import nbd; h = nbd.NBD()")


def test_with_a_closed_handle(ends: Ending) -> None:
    ends("import nbd; h = nbd.NBD(); h.close()")


def test_with_handles_in_a_cycle(ends: Ending) -> None:
    ends("import nbd; h = nbd.NBD(); h.other = nbd.NBD(); h.other.other = h")


def test_with_a_callback_that_refers_to_its_handle(ends: Ending) -> None:
    ends("import nbd; h = nbd.NBD(); h.set_debug_callback(lambda *message: h); h.set_debug(True)")


def test_with_a_view_of_a_chunk(nbdkit: StartServer, ends: Ending) -> None:
    program = """
import nbd, sys
h = nbd.NBD()
h.connect_unix(sys.argv[1])
views = []
h.pread_structured(4096, 0, lambda view, *rest: views.append(view))
"""
    ends(program, nbdkit(*DISK).socket)


def test_with_a_server_as_subprocess(ends: Ending) -> None:
    ends(
        "import nbd; h = nbd.NBD();"
        "h.connect_command(['nbdkit', '-s', '--exit-with-parent', 'memory', '1M'])"
    )


def test_by_an_exception_with_an_open_handle() -> None:
    done = run_program("import nbd; h = nbd.NBD(); h.get_size()")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("nbd.Error: nbd_get_size: ")


def test_by_a_callback(nbdkit: StartServer) -> None:
    program = """
import nbd, sys
h = nbd.NBD()
h.connect_unix(sys.argv[1])
h.pread_structured(512, 0, lambda *chunk: sys.exit(7))
"""
    done = run_program(program, nbdkit(*DISK).socket)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_with_a_handle_of_a_thread_that_has_ended(ends: Ending) -> None:
    program = """
import nbd, threading
handles = []
thread = threading.Thread(target=lambda: handles.append(nbd.NBD()))
thread.start()
thread.join()
assert handles[0].aio_is_created()
"""
    ends(program)


# --- daemon threads ---------------------------------------------------------------------------

# A daemon thread is anywhere in work() when the program exits.
IN_A_DAEMON_THREAD = """
import nbd, sys, threading
started = threading.Event()

def connected():
    h = nbd.NBD()
    h.connect_unix(sys.argv[1])
    return h

def completion(error):
    return 1

{work}

threading.Thread(target=work, daemon=True).start()
started.wait()
"""

WORK = {
    "that reads": """
def work():
    h = connected()
    while True:
        h.pread(512, 0)
        started.set()
""",
    "that reads from a handle of the main thread": """
h = connected()
def work():
    while True:
        h.pread(512, 0)
        started.set()
""",
    "that is called back": """
def work():
    h = connected()
    while True:
        h.pread_structured(512, 0, lambda *chunk: started.set())
""",
    "that keeps commands in flight": """
def work():
    h = connected()
    while True:
        while h.aio_in_flight() < 16:
            h.aio_pread(nbd.Buffer(4096), 0, completion)
        h.poll(-1)
        started.set()
""",
    "that opens and closes handles": """
def work():
    while True:
        connected().close()
        started.set()
""",
    "that drops handles": """
def work():
    while True:
        nbd.NBD()
        started.set()
""",
}

WAIT = {
    "that waits for a reply": """
def work():
    h = connected()
    started.set()
    h.pread(512, 0)
""",
    "that waits in poll": """
def work():
    h = connected()
    h.aio_pread(nbd.Buffer(4096), 0, completion)
    started.set()
    h.poll(-1)
""",
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_with_a_daemon_thread(nbdkit: StartServer, ends: Ending, work: str) -> None:
    ends(IN_A_DAEMON_THREAD.format(work=work), nbdkit(*DISK).socket)


@pytest.mark.parametrize("work", WAIT.values(), ids=WAIT)
def test_with_a_daemon_thread_of_no_end(nbdkit: StartServer, ends: Ending, work: str) -> None:
    ends(IN_A_DAEMON_THREAD.format(work=work), nbdkit(*STUCK).socket)
