"""Callables that make connections, for nbd.open, nbd.copy and nbd.aio.copy."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest

import nbd
from nbd._disks.background import running
from support import servers
from support.handles import closed
from support.usage import collect_garbage, descriptors

#: What a server does so that a copy from it lasts until its connections have joined.
SLOW = ("--filter=log", "--filter=delay", "memory", "64M", "rdelay=5ms")


class Makers:
    """Start servers with TLS, and make callables that trust them."""

    def __init__(self, kind: str, nbdkit: Any, certificates: Path, psk: Path) -> None:
        self._nbdkit = nbdkit
        self._options: dict[str, Path] = (
            {"certificates": certificates} if kind == "certificates" else {"psk": psk}
        )

    def server(self, *arguments: str) -> servers.Server:
        """Start a server that requires TLS."""
        server: servers.Server = self._nbdkit(*arguments, tcp=True, tls="require", **self._options)
        return server

    def prepare(self, handle: nbd.NBD) -> None:
        """Set TLS up."""
        if "psk" in self._options:
            handle.set_tls_psk_file(str(self._options["psk"]))
            handle.set_tls_username("alice")
        else:
            handle.set_tls_certificates(str(self._options["certificates"]))

    def of(self, server: servers.Server) -> partial[nbd.NBD]:
        """Return what a program would write."""
        return partial(nbd.connect, server.uri, timeout=servers.TIMEOUT, prepare=self.prepare)


@pytest.fixture(params=["certificates", "psk"])
def makers(request: pytest.FixtureRequest, nbdkit: Any, certificates: Path, psk: Path) -> Makers:
    """Return servers and callables with certificates, and with pre-shared keys."""
    return Makers(request.param, nbdkit, certificates, psk)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """Fail if a test of a module that imports this leaves a connection open."""
    collect_garbage()
    before = descriptors()
    yield
    until = time.monotonic() + servers.TIMEOUT
    while (running or _aio_copies()) and time.monotonic() < until:
        time.sleep(0.001)
    collect_garbage()
    assert descriptors() <= before


def _aio_copies() -> Any:
    """Return the copies of nbd.aio that are running."""
    module = sys.modules.get("nbd.aio._copy")
    return getattr(module, "_running", ())


class Maker:
    """A callable that connects to a URI, and notes what it has made.

    Attributes:
        made: The handles.
        threads: The threads that have called.
    """

    def __init__(self, uri: str, then: Iterable[Callable[[], Any]] = ()) -> None:
        """Prepare.

        Args:
            uri: The URI.
            then: What to call instead of connecting, at the second call, the third and so on.
        """
        self._uri = uri
        self._then = list(then)
        self.made: list[nbd.NBD] = []
        self.threads: list[threading.Thread] = []

    def __call__(self) -> Any:
        self.threads.append(threading.current_thread())
        if self.made and self._then:
            return self._then.pop(0)()
        self.made.append(nbd.connect(self._uri, timeout=servers.TIMEOUT))
        return self.made[-1]

    def all_closed(self) -> bool:
        """Return whether everything that was made is closed."""
        return all(map(closed, self.made))


class Hanging:
    """A callable that connects only when the test allows it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.begun, self.may_continue, self.ended = (threading.Event() for _ in range(3))
        self.made: list[nbd.NBD] = []

    def __call__(self) -> nbd.NBD:
        self.begun.set()
        try:
            self.may_continue.wait(servers.TIMEOUT)
            self.made.append(nbd.connect(self._uri, timeout=servers.TIMEOUT))
            return self.made[-1]
        finally:
            self.ended.set()


def connected(log: Path) -> int:
    """Return how many connections the log of a server shows."""
    return log.read_text().count(" Connect ")
