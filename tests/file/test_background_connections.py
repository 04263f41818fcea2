# SPDX-License-Identifier: LGPL-2.0-or-later
"""Connections made in the background: each one that succeeds is used, none is waited for."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.forks import forks
from support.programs import run_program
from support.servers import StartServer

import nbd
from nbd._disks.background import Joining

BOUND = 10  # seconds until a test fails because an event does not happen


def run(joining: Joining) -> None:
    """Make all connections."""
    joining.start()
    join_all(joining)


def join_all(joining: Joining) -> None:
    """Wait until no connection is being made."""
    assert joining._thread.join(BOUND)


@contextmanager
def silent_server() -> Iterator[tuple[socket.socket, str]]:
    """Listen, and never send a greeting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(BOUND)
        yield listener, f"nbd://127.0.0.1:{listener.getsockname()[1]}"


def test_each_connection_is_handed_over(nbdkit: StartServer) -> None:
    handles: list[nbd.NBD] = []
    run(Joining(nbdkit("memory", "1M").uri, 3, 5.0, handles.append))
    assert [handle.get_size() for handle in handles] == [1 << 20] * 3
    for handle in handles:
        handle.close()


def test_a_server_that_refuses_costs_nothing(tmp_sock: str) -> None:
    handles: list[nbd.NBD] = []
    run(Joining(f"nbd+unix:///?socket={tmp_sock}", 3, None, handles.append))
    assert handles == []


def test_stopping_abandons_a_connection_that_is_never_greeted() -> None:
    handles: list[nbd.NBD] = []
    with silent_server() as (listener, uri):
        joining = Joining(uri, 3, None, handles.append)
        joining.start()
        server, _ = listener.accept()
        joining.stop()
        join_all(joining)
        with server:
            server.settimeout(BOUND)
            assert server.recv(1) == b""  # the descriptor is closed
        joining.stop()
    assert handles == []


def test_nothing_is_handed_over_after_stopping(nbdkit: StartServer) -> None:
    begun, may_continue = threading.Event(), threading.Event()
    handles: list[nbd.NBD] = []

    def add(handle: nbd.NBD) -> None:
        handles.append(handle)
        begun.set()
        may_continue.wait(BOUND)

    joining = Joining(nbdkit("memory", "1M").uri, 10, None, add)
    joining.start()
    assert begun.wait(BOUND)
    threading.Timer(0.05, may_continue.set).start()
    joining.stop()
    count = len(handles)
    join_all(joining)
    assert len(handles) == count < 10
    for handle in handles:
        handle.close()


def test_a_handle_that_cannot_be_used_is_closed_and_no_other_is_made(nbdkit: StartServer) -> None:
    handles: list[nbd.NBD] = []

    def refuse(handle: nbd.NBD) -> None:
        handles.append(handle)
        raise ValueError("another export")

    run(Joining(nbdkit("memory", "1M").uri, 3, None, refuse))
    assert len(handles) == 1
    with pytest.raises(nbd.ClosedHandle):
        handles[0].get_size()


def test_a_program_ends_while_a_connection_is_made() -> None:
    program = """
import sys
from nbd._disks.background import Joining
joining = Joining(sys.argv[1], 3, None, print)
joining.start()
while joining._connecting is None:
    pass
"""
    with silent_server() as (_, uri):
        done = run_program(program, uri)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_child_of_a_fork_can_stop_while_a_handle_was_being_handed_over(
    nbdkit: StartServer,
) -> None:
    begun, may_continue = threading.Event(), threading.Event()

    def add(handle: nbd.NBD) -> None:
        begun.set()
        may_continue.wait(BOUND)
        handle.close()

    joining = Joining(nbdkit("memory", "1M").uri, 1, None, add)
    joining.start()
    assert begun.wait(BOUND)
    child = os.fork()
    if child == 0:
        joining.stop()
        os._exit(0)
    may_continue.set()
    assert os.waitpid(child, 0)[1] == 0
    join_all(joining)
