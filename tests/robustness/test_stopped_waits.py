"""A timeout or a signal stops every wait of a file, queue, copy or client whose server hangs.

The table is in support/stoppable_calls.py: a row is a call together with the point at which the
server hangs, and a column is a way to stop the call.  Another process makes the calls, because a
test could not end one that hangs.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from support.figures import Figure
from support.programs import finds_support
from support.servers import TIMEOUT, short_folder
from support.stoppable_calls import cells

HANG = float(os.environ.get("NBD_HANG", "30"))  # seconds until a call is considered to hang
AT_ONCE = 3
BOUND = 15_000.0  # milliseconds from the deadline or the signal until everything is closed

#: The exception that a call raises, by the way in which it was stopped.
EXCEPTIONS = {
    "timeout": "Timeout",
    "ctrl_c": "KeyboardInterrupt",
    "handler": "Stop",
    "cancel": "Stop",
    "wait_for": "TimeoutError",
}


class Program:
    """The process that makes the calls; it is started again after a call that hangs."""

    def __init__(self) -> None:
        self._folder = short_folder()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, name: str, way: str) -> dict[str, Any]:
        """Make a call, and return its outcome."""
        process = self._process or self._started()
        assert process.stdin is not None
        process.stdin.write(f"{name} {way}\n".encode())
        process.stdin.flush()
        line = self._line(HANG)
        if line is None:
            self._end_hung(process)
        return json.loads(line or "{}")  # type: ignore[no-any-return]

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "support.stoppable_calls", str(self._folder)]
        with (self._folder / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env=finds_support(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                start_new_session=True,
            )
        assert self._line(TIMEOUT) == b"ready\n", self._errors()
        return self._process

    def _line(self, seconds: float) -> bytes | None:
        """Return the next line that the process prints, or None if it prints none in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        until, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = max(0.0, until - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                return None
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            if not part:
                errors = self._errors()
                self.close_process()
                pytest.fail(f"the program has ended: {errors}")
            line += part
        return line

    def _end_hung(self, process: subprocess.Popen[bytes]) -> None:
        """Find out where a call hangs, and fail."""
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)  # the traceback is written meanwhile
        more = 0
        while more < 3 and self._line(0.5) is None:
            more += 1
            process.send_signal(signal.SIGINT)
        where = self._errors()
        self.close_process()
        pytest.fail(f"it hangs; {more} more signals were sent to it:\n{where}")

    def _errors(self) -> str:
        return (self._folder / "stderr").read_text(errors="replace")[-6000:]

    def close_process(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its servers, which may be stopped
            process.wait(TIMEOUT)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()

    def close(self) -> None:
        """End the process, and remove its folder."""
        self.close_process()
        subprocess.run(["rm", "-rf", str(self._folder)], check=True)


class Programs:
    """Several programs in parallel, since a call spends nearly all of its time waiting."""

    def __init__(self, wanted: list[tuple[str, str]]) -> None:
        self._programs = [Program() for _ in range(AT_ONCE)]
        self._free: queue.SimpleQueue[Program] = queue.SimpleQueue()
        for program in self._programs:
            self._free.put(program)
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._outcomes = {one: self._pool.submit(self._run, *one) for one in wanted}

    def _run(self, name: str, way: str) -> dict[str, Any]:
        program = self._free.get()
        try:
            return program.run(name, way)
        finally:
            self._free.put(program)

    def outcome(self, name: str, way: str) -> dict[str, Any]:
        """Return the outcome of a call.

        PyPy may call a finalizer at any time, and loses the exception that a handler raises in it.
        Therefore a call that hangs on PyPy is repeated once.
        """
        try:
            return self._outcomes[name, way].result()
        except pytest.fail.Exception:
            if sys.implementation.name == "cpython":
                raise
        return self._run(name, way)

    def close(self) -> None:
        """End the programs."""
        self._pool.shutdown(cancel_futures=True)
        for program in self._programs:
            program.close()


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest) -> Iterator[Programs]:
    """Return the processes that make the selected calls; they start at once."""
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    made = Programs(
        [
            (one.params["name"], one.params["way"])
            for one in selected
            if one is not None and {"name", "way", "end"} <= {*one.params}
        ]
    )
    yield made
    made.close()


@pytest.mark.parametrize(
    ("name", "way", "end"),
    [pytest.param(*one, id=f"{one[0]}: {one[1]}") for one in cells()],
)
def test_a_call_whose_server_stops_is_stopped(
    programs: Programs, figure: Figure, name: str, way: str, end: str
) -> None:
    outcome = programs.outcome(name, way)
    assert outcome["failure"] == ""
    if end == "stopped":
        assert outcome["raised"] == EXCEPTIONS[way], outcome["message"]
        if way == "timeout":
            assert outcome["errnum"] == errno.ETIMEDOUT
        if way == "handler":
            assert outcome["is_ours"], outcome["message"]
    else:
        assert outcome["raised"] == "", outcome["message"]
    assert outcome["unraisable"] == []
    if sys.implementation.name == "cpython":  # PyPy runs finalizers at any time
        assert outcome["lost"] == []
    assert outcome["threads"] == []  # which would keep the program from ending
    assert outcome["registered"] == 0
    assert outcome["descriptors"] == 0
    if outcome["late"] is not None:
        figure(f"{name}: {way}: milliseconds late", f"{outcome['late']:.1f}")
        assert outcome["total"] < BOUND
