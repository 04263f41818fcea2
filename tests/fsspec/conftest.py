"""Fixtures for the file system of fsspec."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import fsspec
import pytest
from support.servers import TIMEOUT, StartServer
from support.sizes import KIB

#: The contents of two exports.
DATA = {"one": random.Random(1).randbytes(100 * KIB), "two 2": random.Random(2).randbytes(4 * KIB)}

#: Makes the URL of an export.
MakeUrl = Callable[[str], str]


@pytest.fixture
def fs() -> Iterator[Any]:
    """Return a file system, whose connections are closed after the test."""
    made = fsspec.filesystem("nbd", timeout=TIMEOUT, skip_instance_cache=True)
    yield made
    made._clients.close(wait=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the contents of DATA."""
    folder = tmp_path / "exports"
    folder.mkdir()
    for name, data in DATA.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def url(nbdkit: StartServer, folder: Path) -> MakeUrl:
    """Return a function that makes the URL of an export of the folder's server."""
    server = nbdkit("file", f"dir={folder}")
    return lambda name: server.uri.replace("/?", f"/{name}?")
