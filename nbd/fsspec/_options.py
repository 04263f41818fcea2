# SPDX-License-Identifier: LGPL-2.0-or-later
"""How a file system connects: the options that it was made with."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

from nbd._binding.errors import Error
from nbd._binding.methods import NBD
from nbd._disks.connect import TO_CALL, TO_PREPARE, connect
from nbd._disks.file import open as open_disk
from nbd.aio._connect import Connecting
from nbd.aio._connect import connect as connect_client

#: What a user of fsspec, who has no handle, has to type for a URI with local files.
_TO_ALLOW = "pass uri_allow_local_file=True"


class Options:
    """The options of nbd.open and nbd.aio.connect, and the settings of each new handle.

    Args:
        options: connections, timeout, reconnect and retry_for.
        settings: What each handle is set to, by the name of the set_ method; None sets nothing.
    """

    def __init__(self, options: dict[str, Any], settings: Mapping[str, Any]) -> None:
        self._options = options
        given = {name: value for name, value in settings.items() if value is not None}
        self._prepare = partial(_prepare, given) if given else None
        self.client("nbd://")  # raises for values that are not allowed

    def client(self, url: str) -> Connecting:
        """Return how to connect an nbd.aio.Client."""
        return connect_client(url, prepare=self._prepare, **self._options)

    def file(self, url: str, mode: str) -> BinaryIO:
        """Open a disk as a file."""
        options = dict(self._options)
        if self._prepare is None:
            return open_disk(url, mode, **options)
        retry_for, timeout = options.pop("retry_for"), options["timeout"]
        make = partial(connect, url, timeout=timeout, retry_for=retry_for, prepare=self._prepare)
        return open_disk(make, mode, **options)

    @property
    def timeout(self) -> float | None:
        """How many seconds a call may wait."""
        seconds: float | None = self._options["timeout"]
        return seconds

    @property
    def retry_for(self) -> float | None:
        """For how many seconds a server that does not listen is tried again."""
        seconds: float | None = self._options["retry_for"]
        return seconds

    def prepare(self, handle: NBD) -> None:
        """Set up a new handle."""
        if self._prepare is not None:
            self._prepare(handle)


def _prepare(settings: Mapping[str, Any], handle: NBD) -> None:
    for name, value in settings.items():
        getattr(handle, f"set_{name}")(value)


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Turn the exceptions of nbd into OSErrors whose message names the URL."""
    try:
        yield
    except Error as error:
        raise os_error(error, url) from error


def os_error(error: Error, url: str) -> OSError:
    """Return the OSError for an nbd.Error; its class follows from the errno, as always."""
    number = error.errnum or errno.EIO
    text = error.string or os.strerror(number)
    for advice in (TO_PREPARE, TO_CALL):
        text = text.replace(advice, _TO_ALLOW)
    if number == errno.EROFS:
        return read_only(url)
    return OSError(number, text, url)


def read_only(url: str) -> OSError:
    """Return the exception for a write to a read-only export."""
    return PermissionError(errno.EROFS, "the export is read-only", url)
