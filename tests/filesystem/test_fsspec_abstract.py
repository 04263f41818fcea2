# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec and fsspec's own tests for file systems.

Most of those tests make and remove files and folders, or replace a file by one of another size,
which a server of disks cannot do: those of pipe, open, put and copy, and those of get whose source
has folders.  The one that remains copies a list of files, whose names and contents are ours.
"""

from __future__ import annotations

from hashlib import md5
from pathlib import Path
from typing import Any, Callable

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.tests.abstract import AbstractFixtures
from fsspec.tests.abstract.get import AbstractGetTests
from support.servers import StartServer


class TestGet(AbstractFixtures):  # type: ignore[misc] # fsspec has no annotations
    """Run fsspec's test of get that needs no folders."""

    test_list = AbstractGetTests.test_get_with_source_and_destination_as_list

    @pytest.fixture
    def local_fs(self) -> Any:
        """Return fsspec's file system of local files."""
        return LocalFileSystem(auto_mkdir=True)

    @pytest.fixture
    def fs(self, fs: Any) -> Any:
        """Return the file system under test."""
        return fs

    @pytest.fixture
    def fs_join(self) -> Callable[[str, str], str]:
        """Return a function that makes the URL of an export."""
        return lambda server, name: server.replace("/?", f"/{name}?")

    @pytest.fixture
    def fs_10_files_with_hashed_names(self, nbdkit: StartServer, tmp_path: Path) -> str:
        """Return a server of the files that fsspec's fixture would make."""
        for number in range(10):
            name = md5(str(number).encode()).hexdigest()
            (tmp_path / f"{name}.txt").write_bytes(str(number).encode())
        return nbdkit("file", f"dir={tmp_path}").uri
