# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy with a callable that makes its connections, and closes all of them."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from support.makers import (
    SLOW,
    Hanging,
    Maker,
    Makers,
    connected,
    makers,
    no_descriptor_is_left,
)
from support.programs import run_program
from support.servers import TIMEOUT, StartServer, program
from support.signals import Stop, alarm
from support.sizes import MIB

import nbd

__all__ = ["makers", "no_descriptor_is_left"]


def test_tls_over_four_connections_of_the_source(makers: Makers, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = makers.server(*SLOW, f"logfile={log}")
    nbd.copy(makers.of(server), tmp_path / "copied", connections=4, sparse=False)
    assert connected(log) == 4
    assert os.path.getsize(tmp_path / "copied") == 64 * MIB


def test_tls_over_four_connections_of_the_target(
    makers: Makers, nbdkit: StartServer, tmp_path: Path
) -> None:
    log, image = tmp_path / "log", tmp_path / "image"
    delays = "--filter=log", "--filter=delay", "file", str(image), "wdelay=5ms"
    image.write_bytes(bytes(64 * MIB))
    source = nbdkit("--threads=4", "pattern", "64M").uri
    server = makers.server(*delays, f"logfile={log}")
    assert nbd.copy(source, makers.of(server), connections=4) == (64 * MIB, 0)
    assert connected(log) == 4
    nbd.copy(source, tmp_path / "expected")
    assert image.read_bytes() == (tmp_path / "expected").read_bytes()


def test_tls_from_and_to_a_stream(makers: Makers) -> None:
    server = makers.server("memory", "1M")
    data = os.urandom(MIB)
    assert nbd.copy(io.BytesIO(data), makers.of(server)) == (MIB, 0)
    target = io.BytesIO()
    nbd.copy(makers.of(server), target)
    assert target.getvalue() == data


def test_the_first_connection_is_made_by_the_calling_thread_and_others_by_another(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    maker = Maker(nbdkit(*SLOW, f"logfile={tmp_path / 'log'}").uri)
    nbd.copy(maker, tmp_path / "copied", connections=3, sparse=False)
    assert len(maker.made) == 3
    assert maker.all_closed()
    assert maker.threads[0] is threading.main_thread()
    assert threading.main_thread() not in maker.threads[1:]


def test_one_connection_is_made_where_the_server_does_not_allow_several(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    maker = Maker(nbdkit("--filter=multi-conn", *SLOW[1:], "multi-conn-mode=disable").uri)
    nbd.copy(maker, tmp_path / "copied", connections=3, sparse=False)
    assert len(maker.made) == 1
    assert maker.all_closed()


def test_a_server_that_the_callable_starts_has_one_connection(tmp_path: Path) -> None:
    """Each further call would start another server, with another disk."""
    command = [program("nbdkit"), "-s", "--filter=delay", "memory", "64M", "wdelay=2ms"]
    calls = []

    def connect() -> nbd.NBD:
        calls.append(1)
        return nbd.connect(command, timeout=TIMEOUT)

    with open(tmp_path / "source", "wb") as file:
        file.write(b"\1" * (64 * MIB))
    assert nbd.copy(tmp_path / "source", connect, connections=4) == (64 * MIB, 0)
    assert len(calls) == 1


@pytest.mark.parametrize("side", ["source", "target"])
def test_the_message_of_a_failure_names_the_server(
    nbdkit: StartServer, tmp_path: Path, side: str
) -> None:
    uri = nbdkit("--filter=error", "pattern", "1M", "error=EIO", "error-rate=100%").uri
    with pytest.raises(nbd.Error) as caught:
        nbd.copy(Maker(uri), tmp_path / "copied", sparse=False)
    assert uri in str(caught.value)


class Failed(Exception):
    pass


def fail() -> Any:
    """Raise what no caller expects."""
    raise Failed


async def coroutine_function() -> nbd.NBD:
    """Connect, but only for who awaits it."""
    return nbd.NBD()


def test_what_the_first_call_raises_passes_through(tmp_path: Path) -> None:
    with pytest.raises(Failed):
        nbd.copy(fail, tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


def test_a_target_that_fails_closes_what_the_source_has_made(server: Any, tmp_path: Path) -> None:
    maker = Maker(server.uri)
    with pytest.raises(Failed):
        nbd.copy(maker, fail)
    assert maker.all_closed()
    with pytest.raises(FileNotFoundError):
        nbd.copy(maker, tmp_path / "missing" / "file")
    assert len(maker.made) == 2
    assert maker.all_closed()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: None, "source: the callable has returned NoneType: .*connected nbd.NBD"),
        (lambda: "nbd://localhost", "source: the callable has returned str: .*connected nbd.NBD"),
        (coroutine_function, "has returned coroutine: a coroutine function cannot be used"),
        (partial(coroutine_function), "a coroutine function cannot be used"),
        (lambda: coroutine_function(), "a coroutine function cannot be used"),
    ],
)
def test_what_is_no_handle_is_refused(
    tmp_path: Path, function: Callable[[], Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        nbd.copy(function, tmp_path / "copied")


def test_a_coroutine_function_leaves_no_warning(tmp_path: Path) -> None:
    text = """
import nbd, sys
async def connect(): pass
try:
    nbd.copy(connect, sys.argv[1])
except TypeError:
    print("refused")
"""
    done = run_program(text, str(tmp_path / "copied"))
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_a_handle_that_is_not_connected_is_refused_and_closed(tmp_path: Path) -> None:
    made: list[nbd.NBD] = []

    def make() -> nbd.NBD:
        made.append(nbd.NBD())
        return made[-1]

    with pytest.raises(
        nbd.Error, match=r"source: .*has returned: the handle is not connected"
    ) as e:
        nbd.copy(make, tmp_path / "copied")
    assert e.value.errnum == errno.ENOTCONN
    with pytest.raises(nbd.ClosedHandle):
        made[0].get_debug()


def test_a_closed_handle_is_refused(tmp_path: Path) -> None:
    def make() -> nbd.NBD:
        made = nbd.NBD()
        made.close()
        return made

    with pytest.raises(nbd.ClosedHandle, match=r"source: .*the handle is closed"):
        nbd.copy(make, tmp_path / "copied")


def test_one_handle_for_both_sides_is_refused(server: Any) -> None:
    with nbd.connect(server.uri) as h:
        with pytest.raises(ValueError, match=r"target: the callable .* in use already"):
            nbd.copy(h, lambda: h)
        assert h.get_size() == MIB  # it is the caller's, and open
    h = nbd.connect(server.uri)
    with pytest.raises(ValueError, match=r"target: the callable .* in use already"):
        nbd.copy(lambda: h, lambda: h)
    with pytest.raises(nbd.ClosedHandle):
        h.get_size()
    h = nbd.connect(server.uri)
    with pytest.raises(ValueError, match="in use on the other side"):
        nbd.copy(lambda: h, h)


def test_the_same_handle_again_ends_the_copy(nbdkit: StartServer, tmp_path: Path) -> None:
    maker = Maker(nbdkit(*SLOW[1:]).uri, then=[lambda: maker.made[0]])
    with pytest.raises(ValueError, match=r"source: the callable .* at each call"):
        nbd.copy(maker, tmp_path / "copied", connections=3, sparse=False)
    assert maker.all_closed()


def test_something_else_than_a_handle_at_the_second_call_ends_the_copy(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    maker = Maker(nbdkit(*SLOW[1:]).uri, then=[lambda: 5])
    with pytest.raises(TypeError, match="source: the callable has returned int"):
        nbd.copy(maker, tmp_path / "copied", connections=3, sparse=False)
    assert maker.all_closed()


def leave() -> Any:
    """Raise what ends a program."""
    raise SystemExit


@pytest.mark.parametrize("raising", [fail, leave])
def test_a_further_connection_that_fails_is_left_out(
    nbdkit: StartServer, tmp_path: Path, raising: Callable[[], Any]
) -> None:
    maker = Maker(nbdkit(*SLOW[1:]).uri, then=[raising])
    nbd.copy(maker, tmp_path / "copied", connections=3, sparse=False)
    assert (len(maker.made), len(maker.threads)) == (1, 2)
    assert maker.all_closed()


@pytest.mark.parametrize("difference", ["size", "name", "block size"])
def test_a_further_connection_to_another_export_is_left_out(
    nbdkit: StartServer, tmp_path: Path, difference: str
) -> None:
    server = nbdkit(*SLOW[1:])
    others = {
        "size": lambda: nbd.connect(nbdkit("pattern", "1M").uri),
        "name": lambda: nbd.connect(
            nbdkit("pattern", "64M").uri, prepare=lambda h: h.set_export_name("other")
        ),
        "block size": lambda: nbd.connect(
            nbdkit(
                "--filter=blocksize-policy",
                *("pattern", "64M", "blocksize-minimum=4096"),
                *("blocksize-preferred=65536", "blocksize-maximum=16M"),
            ).uri
        ),
    }
    made: list[nbd.NBD] = []

    def other() -> nbd.NBD:
        made.append(others[difference]())
        return made[-1]

    maker = Maker(server.uri, then=[other])
    nbd.copy(maker, tmp_path / "copied", connections=2, sparse=False)
    maker.made += made
    assert len(maker.made) == 2
    assert maker.all_closed()
    assert (tmp_path / "copied").read_bytes() == bytes(64 * MIB)


def test_a_signal_ends_the_first_call(server: Any, tmp_path: Path) -> None:
    maker = Maker(server.uri)
    with alarm(), pytest.raises(Stop):
        nbd.copy(maker, partial(time.sleep, TIMEOUT))
    assert maker.all_closed()


def test_a_signal_during_the_copy_closes_all_connections(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    def stop(done: int, total: int | None) -> None:
        if len(maker.made) == 3:
            raise Stop

    maker = Maker(nbdkit("--filter=delay", "memory", "1G", "rdelay=20ms").uri)
    with pytest.raises(Stop):
        nbd.copy(maker, tmp_path / "copied", connections=3, sparse=False, progress=stop)
    assert maker.all_closed()


def test_a_second_call_that_hangs_does_not_delay_the_end(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    uri = nbdkit("--threads=4", "pattern", "64M").uri
    hanging = Hanging(uri)
    maker = Maker(uri, then=[hanging])
    nbd.copy(maker, tmp_path / "copied", connections=2)
    assert hanging.begun.is_set()
    assert not hanging.ended.is_set()
    assert maker.all_closed()
    hanging.may_continue.set()  # what it makes too late is closed: see no_descriptor_is_left


def test_a_program_ends_while_the_second_call_hangs(nbdkit: StartServer, tmp_path: Path) -> None:
    text = """
import sys, threading, nbd
calls = []
def connect():
    calls.append(1)
    if len(calls) > 1:
        threading.Event().wait()
    return nbd.connect(sys.argv[1], timeout=20)
print(nbd.copy(connect, sys.argv[2], connections=3), len(calls))
"""
    uri = nbdkit("--threads=4", "pattern", "64M").uri
    done = run_program(text, uri, str(tmp_path / "copied"))
    assert (done.returncode, done.stdout, done.stderr) == (
        0, f"Copied(copied={64 * MIB}, zeroed=0) 2\n", ""
    )  # fmt: skip


def test_the_timeout_of_its_handle_bounds_a_copy_that_has_none(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    uri = nbdkit("--filter=delay", "memory", "1M", "rdelay=3600").uri
    connect = partial(nbd.connect, uri, timeout=0.3)
    with pytest.raises(nbd.Timeout, match=r"for 0\.3 seconds"):
        nbd.copy(connect, tmp_path / "copied", sparse=False)
    with pytest.raises(nbd.Timeout, match=r"for 0\.2 seconds"):
        nbd.copy(connect, tmp_path / "copied", sparse=False, timeout=0.2)


def test_a_file_that_can_be_called_is_a_file(tmp_path: Path) -> None:
    class File(io.BytesIO):
        def __call__(self) -> None:
            raise AssertionError

    target = File()
    assert nbd.copy(File(b"content"), target) == (7, 0)
    assert target.getvalue() == b"content"


def test_a_path_that_can_be_called_is_a_path(tmp_path: Path) -> None:
    class Named:
        def __fspath__(self) -> str:
            return str(tmp_path / "source")

        def __call__(self) -> None:
            raise AssertionError

    (tmp_path / "source").write_bytes(b"content")
    nbd.copy(Named(), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"content"


def copy_in_a_loop(*sides: Any) -> None:
    """Do the same with nbd.aio.copy."""
    asyncio.run(nbd.aio.copy(*sides))


@pytest.mark.parametrize("what", ["tls-certificates", "tls-psk-file"])
@pytest.mark.parametrize(
    "call", [nbd.open, lambda uri: nbd.copy(uri, "x"), lambda uri: copy_in_a_loop("/dev/null", uri)]
)
def test_the_error_for_a_uri_with_local_files_says_what_to_type(
    certificates: Path, nbdkit: StartServer, call: Callable[[str], Any], what: str
) -> None:
    with pytest.raises(nbd.Error, match=r"functools\.partial") as caught:
        call(f"nbds://127.0.0.1:1/?{what}={certificates}")
    assert caught.value.errno == "EPERM"
    advice = (
        "functools.partial(nbd.connect, uri, prepare=lambda h: h.set_uri_allow_local_file(True))"
    )
    assert caught.value.string.endswith(advice)


def test_the_advice_for_a_uri_with_local_files_works(
    certificates: Path, nbdkit: StartServer, tmp_path: Path
) -> None:
    server = nbdkit("memory", "1M", tcp=True, tls="require", certificates=certificates)
    uri = f"{server.uri}/?tls-certificates={certificates}"
    trusting = partial(nbd.connect, uri, prepare=lambda h: h.set_uri_allow_local_file(True))
    assert nbd.copy(trusting, tmp_path / "copied") == (0, MIB)


@pytest.mark.parametrize(
    "connect", [nbd.connect, lambda uri: asyncio.run(nbd.aio.connect(uri)._client())]
)
def test_the_error_of_connect_names_its_argument(connect: Callable[[str], Any]) -> None:
    with pytest.raises(nbd.Error, match=r"pass prepare=lambda h: h.set_uri_allow_local_file"):
        connect("nbds://127.0.0.1:1/?tls-certificates=/nowhere")
