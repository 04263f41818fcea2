# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.open: what programs ask of a file that they are given, as of one of the built-in open."""

from __future__ import annotations

import io
import mmap
import os
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
from support.servers import Server
from support.sizes import MIB

import nbd

BUFFERINGS = [0, -1]
MODES = ["rb", "br", "r+b", "rb+", "+br", "wb", "bw", "w+b"]


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("mode", MODES)
def test_mode_is_what_the_builtin_open_says(
    server: Server, tmp_path: Path, mode: str, buffering: int
) -> None:
    path = tmp_path / "file"
    path.touch()
    with (
        open(path, mode, buffering=buffering) as file,
        nbd.open(server.uri, mode, buffering=buffering) as disk,
    ):
        # CPython 3.15 says that the file was truncated, which a disk is not.
        assert disk.mode == file.mode.replace("wb+", "rb+")


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_name_is_the_uri(server: Server, buffering: int) -> None:
    with nbd.open(server.uri, buffering=buffering) as disk:
        assert disk.name == server.uri


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("mode", ["r+b", "wb"])
def test_truncating_to_the_size_of_the_disk_changes_nothing(
    server: Server, mode: str, buffering: int
) -> None:
    with nbd.open(server.uri, mode, buffering=buffering) as disk:
        disk.write(b"data")
        assert disk.truncate(MIB) == MIB
        assert disk.tell() == 4
        disk.write(b"more")
    with nbd.open(server.uri) as disk:
        assert disk.read(9) == b"datamore\0"


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_truncating_at_the_end_of_the_disk_changes_nothing(server: Server, buffering: int) -> None:
    with nbd.open(server.uri, "r+b", buffering=buffering) as disk:
        disk.seek(-3, os.SEEK_END)
        disk.write(b"end")
        assert disk.truncate() == MIB
        disk.seek(-4, os.SEEK_END)
        assert disk.read() == b"\0end"


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize("size", [None, 0, MIB - 1, MIB + 1, -1])
def test_truncating_to_another_size_is_refused(
    server: Server, size: int | None, buffering: int
) -> None:
    with nbd.open(server.uri, "r+b", buffering=buffering) as disk:
        disk.write(b"data")
        with pytest.raises(io.UnsupportedOperation, match=f"fixed size, here {MIB} bytes"):
            disk.truncate(size)
        disk.seek(0)
        assert disk.read(5) == b"data\0"


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_file_for_reading_is_not_truncated(server: Server, buffering: int) -> None:
    with (
        nbd.open(server.uri, buffering=buffering) as disk,
        pytest.raises(io.UnsupportedOperation, match="truncate"),
    ):
        disk.truncate(MIB)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_closed_file_is_not_truncated(server: Server, buffering: int) -> None:
    disk = nbd.open(server.uri, "r+b", buffering=buffering)
    disk.close()
    with pytest.raises(ValueError, match="closed file"):
        disk.truncate(MIB)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_it_has_no_descriptor_and_is_no_terminal(server: Server, buffering: int) -> None:
    with nbd.open(server.uri, buffering=buffering) as disk:
        assert not disk.isatty()
        with pytest.raises(io.UnsupportedOperation, match=r"readinto.*instead of numpy\.fromfile"):
            disk.fileno()


def test_mmap_says_what_to_use_instead(server: Server) -> None:
    with (
        nbd.open(server.uri) as disk,
        pytest.raises(io.UnsupportedOperation, match="has no descriptor; read it with"),
    ):
        mmap.mmap(disk.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_file_is_not_pickled(server: Server, buffering: int) -> None:
    with (
        nbd.open(server.uri, buffering=buffering) as disk,
        pytest.raises(TypeError, match="pickled; open it again"),
    ):
        pickle.dumps(disk)


def test_a_text_layer_reads_and_writes_lines(server: Server) -> None:
    with nbd.open(server.uri, "r+b") as disk:
        text = io.TextIOWrapper(cast("Any", disk), encoding="utf-8", newline="\n")
        text.write("caf\u00e9\nau lait\n")
        text.seek(0)
        assert [text.readline(), text.readline()] == ["caf\u00e9\n", "au lait\n"]
        text.detach()
