"""In a subinterpreter of CPython importing nbd is refused, and the main interpreter is unaffected.

libnbd calls functions of the interpreter with which the process began.
"""

from __future__ import annotations

import sys
from typing import Callable

import pytest
from support.programs import run_program
from support.servers import StartServer

pytestmark = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="only CPython has subinterpreters"
)

Runs = Callable[..., str]

KINDS = "isolated", "legacy"

PROGRAM = """
import sys, warnings

ATTEMPT = '''
try:
    import nbd
except ImportError as refusal:
    print("refused:", refusal, flush=True)
else:
    print("imported", flush=True)
'''

if sys.version_info >= (3, 13):
    import _interpreters
    create, destroy = _interpreters.create, _interpreters.destroy
    def run(number, code):
        failed = _interpreters.exec(number, code)
        assert failed is None, failed
else:
    import _xxsubinterpreters
    destroy, run = _xxsubinterpreters.destroy, _xxsubinterpreters.run_string
    def create(kind):
        return _xxsubinterpreters.create(isolated=kind == "isolated")

def import_in_a_subinterpreter(times=1):
    number = create(sys.argv[2])
    for _ in range(times):
        run(number, ATTEMPT)
    destroy(number)

def connected():
    import nbd
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.connect_unix(sys.argv[1])
    return h

def use(h):
    h.pwrite(b"x" * 512, 0)
    views = []
    h.pread_structured(512, 0, lambda view, *rest: views.append(bytes(view)))
    assert views == [b"x" * 512]
    contexts = []
    h.block_status(512, 0, lambda context, *rest: contexts.append(context))
    assert contexts == ["base:allocation"]

"""


@pytest.fixture(params=KINDS)
def runs(nbdkit: StartServer, request: pytest.FixtureRequest) -> Runs:
    """Run a program with a server and a kind of subinterpreter, and return its output."""
    server = nbdkit("memory", "1M")

    def run(program: str) -> str:
        done = run_program(PROGRAM + program, server.socket, request.param)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return run


def check_refused(printed: str, times: int = 1) -> None:
    """Check that every import in a program was refused with a reason."""
    lines = printed.splitlines()
    assert len(lines) == times, printed
    for line in lines:
        assert line.startswith("refused:"), printed
        assert "subinterpreter" in line, printed


def test_the_import_is_refused_before_that_of_the_main_interpreter(runs: Runs) -> None:
    check_refused(runs("import_in_a_subinterpreter()\nuse(connected())\n"))


def test_the_import_is_refused_after_that_of_the_main_interpreter(runs: Runs) -> None:
    check_refused(runs("h = connected()\nimport_in_a_subinterpreter()\nuse(h)\nuse(connected())\n"))


def test_the_import_is_refused_each_time_that_it_is_tried(runs: Runs) -> None:
    check_refused(runs("h = connected()\nimport_in_a_subinterpreter(3)\nuse(h)\n"), 3)


def test_the_import_is_refused_in_every_subinterpreter(runs: Runs) -> None:
    program = """
h = connected()
for _ in range(3):
    import_in_a_subinterpreter()
    use(h)
"""
    check_refused(runs(program), 3)


def test_the_import_is_refused_where_no_other_interpreter_imports(runs: Runs) -> None:
    check_refused(runs("import_in_a_subinterpreter()\n"))


def test_commands_in_flight_in_the_main_interpreter_end_with_their_callables(runs: Runs) -> None:
    program = """
h = connected()
h.pwrite(b"y" * 512, 0)
errors, buffer = [], bytearray(512)
h.aio_pread(buffer, 0, lambda error: errors.append(error.value) or 1)
h.aio_flush(lambda error: errors.append(error.value) or 1)
import_in_a_subinterpreter()
while h.aio_in_flight():
    assert h.poll(20000) == 1
assert (errors, buffer) == ([0, 0], b"y" * 512)
"""
    check_refused(runs(program))


def test_the_import_is_refused_in_a_subinterpreter_of_another_thread(runs: Runs) -> None:
    program = """
import threading
h = connected()
thread = threading.Thread(target=import_in_a_subinterpreter)
thread.start()
while thread.is_alive():
    use(h)
thread.join()
use(h)
"""
    check_refused(runs(program))
