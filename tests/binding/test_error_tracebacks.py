# SPDX-License-Identifier: LGPL-2.0-or-later
"""Tracebacks of failed calls: the method is the only frame of the package, below the caller's."""

from __future__ import annotations

import os
import signal
from types import TracebackType
from typing import Any, Callable

import pytest
from support.servers import Server
from support.waits import paused

import nbd

PACKAGE = os.path.dirname(nbd.__file__) + os.sep
Call = Callable[[nbd.NBD], object]
StartServer = Callable[..., Server]


def frames(traceback: TracebackType | None) -> list[str]:
    """Return the names of the functions in a traceback; only those of the package are marked."""
    names = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        ours = "nbd." if code.co_filename.startswith(PACKAGE) else ""
        names.append(ours + code.co_name)
        traceback = traceback.tb_next
    return names


def raised_by(call: Call, h: nbd.NBD) -> BaseException:
    """Return what a call raises."""
    try:
        call(h)
    except BaseException as raised:
        return raised
    raise AssertionError("it has not failed")


def fail(*arguments: object) -> int:
    raise KeyError("mine")


NOT_CONNECTED: dict[str, Call] = {
    "pread": lambda h: h.pread(512, 0),
    "pread_into": lambda h: h.pread_into(bytearray(512), 0),
    "aio_pread": lambda h: h.aio_pread(bytearray(512), 0),
    "block_status": lambda h: h.block_status(512, 0, fail),
    "get_size": lambda h: h.get_size(),
    "get_export_name": lambda h: h.get_meta_context(9),
    "set_tls": lambda h: h.set_tls(99),
    "opt_go": lambda h: h.opt_go(),
}
REFUSED: dict[str, Call] = {
    "pread": lambda h: h.pread("512", 0),  # type: ignore[arg-type]
    "pread with flags": lambda h: h.pread(512, 0, 1 << 40),
    "pread of a negative count": lambda h: h.pread(-1, 0),
    "pread_into": lambda h: h.pread_into(bytes(512), 0),
    "pwrite": lambda h: h.pwrite(5, 0),  # type: ignore[arg-type]
    "aio_pread": lambda h: h.aio_pread(b"", 0, 5),  # type: ignore[arg-type]
    "connect_uri": lambda h: h.connect_uri(5),  # type: ignore[arg-type]
    "connect_command": lambda h: h.connect_command([5]),  # type: ignore[list-item]
    "aio_connect": lambda h: h.aio_connect(("nowhere.invalid", 10809)),
    "set_tls": lambda h: h.set_tls("on"),  # type: ignore[arg-type]
    "settimeout": lambda h: h.settimeout(0),
}


@pytest.mark.parametrize("name", NOT_CONNECTED)
def test_a_failed_call_shows_its_method_alone(h: nbd.NBD, name: str) -> None:
    error = raised_by(NOT_CONNECTED[name], h)
    assert isinstance(error, nbd.Error)
    method = "get_meta_context" if name == "get_export_name" else name
    assert frames(error.__traceback__) == ["raised_by", "<lambda>", f"nbd.{method}"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_argument_shows_the_method_alone(h: nbd.NBD, name: str) -> None:
    error = raised_by(REFUSED[name], h)
    assert not isinstance(error, AssertionError)
    assert frames(error.__traceback__) == ["raised_by", "<lambda>", f"nbd.{name.split()[0]}"]


@pytest.mark.parametrize("name", NOT_CONNECTED)
def test_a_call_of_a_closed_handle_shows_the_method_alone(h: nbd.NBD, name: str) -> None:
    h.close()
    error = raised_by(NOT_CONNECTED[name], h)
    assert type(error) is nbd.ClosedHandle
    assert error.__context__ is None
    assert len(frames(error.__traceback__)) == 3


@pytest.mark.parametrize("name", REFUSED)
def test_a_closed_handle_is_shown_without_what_the_argument_was_refused_for(
    h: nbd.NBD, name: str
) -> None:
    h.close()
    error = raised_by(REFUSED[name], h)
    assert type(error) is nbd.ClosedHandle
    assert error.__suppress_context__
    assert len(frames(error.__traceback__)) == 3


def test_a_second_close_shows_close_alone(h: nbd.NBD) -> None:
    h.close()
    error = raised_by(nbd.NBD.close, h)
    assert frames(error.__traceback__) == ["raised_by", "nbd.close"]


def test_a_timeout_shows_the_method_alone(nbdkit: StartServer, h: nbd.NBD) -> None:
    server = nbdkit("memory", "1M")
    h.connect_unix(server.socket)
    h.settimeout(0.05)
    with paused(server):
        error = raised_by(lambda h: h.pread(512, 0), h)
    assert type(error) is nbd.Timeout
    assert frames(error.__traceback__) == ["raised_by", "<lambda>", "nbd.pread"]


def test_a_failed_call_whose_callback_raised_shows_the_method_alone(disk: nbd.NBD) -> None:
    error = raised_by(lambda h: h.pread_structured(512, 0, fail), disk)
    assert type(error) is nbd.Error
    assert isinstance(error.__cause__, KeyError)
    assert frames(error.__traceback__) == ["raised_by", "<lambda>", "nbd.pread_structured"]


def test_what_the_users_own_code_raised_is_shown_down_to_it(h: nbd.NBD) -> None:
    class Number:
        def __index__(self) -> int:
            raise KeyError("mine")

    error = raised_by(lambda h: h.pread(Number(), 0), h)  # type: ignore[arg-type]
    assert frames(error.__traceback__) == ["raised_by", "<lambda>", "nbd.pread", "__index__"]


STOPPED: dict[str, Call] = {
    "pread": lambda h: h.pread(512, 0),
    "opt_go": lambda h: h.opt_go(),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_handler_that_stops_a_call_is_shown(
    nbdkit: StartServer, h: nbd.NBD, name: str
) -> None:
    h.set_opt_mode(name == "opt_go")
    server = nbdkit("memory", "1M")
    h.connect_unix(server.socket)

    def handler(number: int, frame: Any) -> None:
        raise KeyError("mine")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with paused(server):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            error = raised_by(STOPPED[name], h)
    finally:
        signal.signal(signal.SIGALRM, before)
    shown = frames(error.__traceback__)
    assert type(error) is KeyError
    assert shown[:3] == ["raised_by", "<lambda>", f"nbd.{name}"]
    assert shown[-1] == "handler"
    assert len(shown) <= 5  # between them the function in which Python has run the handler


def test_the_line_above_the_method_is_the_callers(h: nbd.NBD) -> None:
    def call(h: nbd.NBD) -> object:
        return h.pread(512, 0)

    traceback = raised_by(call, h).__traceback__
    assert traceback is not None
    assert traceback.tb_next is not None
    assert traceback.tb_next.tb_lineno == call.__code__.co_firstlineno + 1
