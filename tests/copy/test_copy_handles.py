# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.copy with a list of the caller's handles: several connections, which stay open."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.servers import StartServer
from support.signals import Stop, stop
from support.sizes import MIB

import nbd


@pytest.fixture
def connect() -> Iterator[Any]:
    """Connect handles, and close them after the test."""
    with contextlib.ExitStack() as opened:
        yield lambda uri, **options: opened.enter_context(nbd.connect(uri, timeout=20, **options))


def logged(path: Path, command: str) -> set[str]:
    """Return which connections of a server have had a command."""
    lines = path.read_text().splitlines()
    return {line.split("connection=")[1].split()[0] for line in lines if f" {command} id=" in line}


@pytest.mark.parametrize("kind", [list, tuple])
def test_all_handles_of_both_sides_are_used_and_stay_open(
    nbdkit: StartServer, tmp_path: Path, connect: Any, kind: Any
) -> None:
    image = tmp_path / "image"
    logs = tmp_path / "reads", tmp_path / "writes"
    first = nbdkit("--threads=4", "--filter=log", "pattern", "32M", f"logfile={logs[0]}")
    image.write_bytes(bytes(32 * MIB))
    second = nbdkit("--threads=4", "--filter=log", "file", str(image), f"logfile={logs[1]}")
    source = kind(connect(first.uri) for _ in range(3))
    target = kind(connect(second.uri) for _ in range(2))
    assert nbd.copy(source, target) == (32 * MIB, 0)
    assert [len(logged(logs[0], "Read")), len(logged(logs[1], "Write"))] == [3, 2]
    assert {h.get_size() for h in (*source, *target)} == {32 * MIB}
    nbd.copy(first.uri, tmp_path / "expected")
    assert image.read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_list_may_have_one_handle(server: Any, tmp_path: Path, connect: Any) -> None:
    h = connect(server.uri)
    assert sum(nbd.copy([h], tmp_path / "copied")) == MIB


@pytest.mark.parametrize("raised", ["signal", "error"])
def test_handles_stay_open_after_a_failure(
    nbdkit: StartServer, tmp_path: Path, connect: Any, raised: str
) -> None:
    def progress(done: int, total: int | None) -> None:
        if raised == "signal":
            stop(0, None)

    error = ["--filter=error", "error=EIO", "error-rate=100%"] if raised == "error" else []
    uri = nbdkit("--threads=4", *error[:1], "memory", "32M", *error[1:]).uri
    handles = [connect(uri) for _ in range(2)]
    with pytest.raises(Stop if raised == "signal" else nbd.Error):
        nbd.copy(handles, tmp_path / "copied", sparse=False, progress=progress)
    assert [h.get_size() for h in handles] == [32 * MIB] * 2


def test_a_handle_that_is_given_twice_is_refused(server: Any, connect: Any) -> None:
    h, other = connect(server.uri), connect(server.uri)
    with pytest.raises(ValueError, match=r"source\[2\]: the same handle is given twice"):
        nbd.copy([h, other, h], "/dev/null")


def test_a_handle_for_both_sides_is_refused(server: Any, connect: Any) -> None:
    h, other = connect(server.uri), connect(server.uri)
    sides: list[tuple[Any, Any]] = [(h, h), ([h], h), ([h, other], h), (h, [other, h])]
    for source, target in sides:
        with pytest.raises(ValueError, match="target: a handle is given twice"):
            nbd.copy(source, target)


@pytest.mark.parametrize("other", ["nbd://localhost", None, 5])
def test_a_mixed_list_is_refused(server: Any, connect: Any, other: Any) -> None:
    kind = type(other).__name__
    with pytest.raises(TypeError, match=rf"source\[1\]: nbd.NBD is needed, not {kind}: a list"):
        nbd.copy([connect(server.uri), other], "/dev/null")
    with pytest.raises(TypeError, match=rf"target\[0\]: nbd.NBD is needed, not {kind}: a list"):
        nbd.copy("/dev/zero", (other, connect(server.uri)))


def test_handles_of_different_exports_are_refused(
    nbdkit: StartServer, server: Any, connect: Any
) -> None:
    first = connect(server.uri)
    others = [
        connect(nbdkit("memory", "2M").uri),
        connect(server.uri, prepare=lambda h: h.set_export_name("other")),
        connect(nbdkit("--readonly", "memory", "1M").uri),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"source\[1\]: it is connected to another export"):
            nbd.copy([first, other], "/dev/null")


def test_a_handle_that_is_not_connected_is_refused(server: Any, connect: Any) -> None:
    with nbd.NBD() as h, pytest.raises(nbd.Error, match=r"source\[1\]: the handle is not") as e:
        nbd.copy([connect(server.uri), h], "/dev/null")
    assert e.value.errnum == errno.ENOTCONN
    with pytest.raises(nbd.ClosedHandle, match=r"source\[1\]: the handle is closed"):
        nbd.copy([connect(server.uri), h], "/dev/null")


def test_a_target_over_several_connections_needs_the_consent_of_its_server(
    nbdkit: StartServer, tmp_path: Path, connect: Any
) -> None:
    options = "--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable"
    uri = nbdkit("--threads=4", *options).uri
    handles = [connect(uri) for _ in range(2)]
    (tmp_path / "source").write_bytes(os.urandom(MIB))
    with pytest.raises(ValueError, match=r"target: .*can_multi_conn.*pass one handle"):
        nbd.copy(tmp_path / "source", handles)
    assert nbd.copy(tmp_path / "source", handles[:1]) == (MIB, 0)
    nbd.copy(handles, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "source").read_bytes()
