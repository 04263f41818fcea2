"""Fixtures for servers and handles, and checks that nothing leaks."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Callable

import pytest

pytest.register_assert_rewrite("support")  # before it is imported: its assertions show values

from support import figures, servers  # noqa: E402
from support.sizes import KIB, MIB  # noqa: E402
from support.usage import registered  # noqa: E402

import nbd  # noqa: E402
from nbd.queue import Queue  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Declare our marker, and refuse to test the checkout instead of the installed package."""
    config.addinivalue_line(
        "markers", "needs(*names): skip where the libnbd in use lacks one of these methods"
    )
    checkout = Path(__file__).resolve().parent.parent
    if Path(nbd.__file__).resolve().parent.parent == checkout and not is_editable():
        pytest.exit(f"nbd came from {checkout}, and not from the installed package", 3)


def is_editable() -> bool:
    """Return whether the package was installed by `pip install -e`."""
    try:
        origin = distribution("libnbd-cffi").read_text("direct_url.json")
    except PackageNotFoundError:
        return False
    return bool(json.loads(origin or "{}").get("dir_info", {}).get("editable"))


def pytest_report_header() -> str:
    """Name the package and the libnbd under test."""
    return f"nbd: {nbd.__file__}, libnbd {nbd.NBD().get_version()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose methods the libnbd in use lacks."""
    for marker in item.iter_markers("needs"):
        reason = servers.library_has(nbd, marker.args)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail at the end of the session if a server started by a test or a handle is running."""
    yield
    gc.collect()
    left = servers.children()
    assert not left, f"these processes are still running: {left}"


@pytest.fixture
def figure(record_property: figures.Figure) -> figures.Figure:
    """Record a figure: figure("kills: commands that failed", 64)."""

    def record(name: str, value: object) -> None:
        record_property(name, value)
        figures.show(name, value)

    return record


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Return a folder for Unix sockets: the path of tmp_path can be too long for sun_path."""
    folder = servers.short_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def tmp_sock(short_path: Path) -> str:
    """Return the path of a Unix socket that does not exist yet."""
    return str(short_path / "sock")


@pytest.fixture
def nbdkit() -> Iterator[servers.StartServer]:
    """Start nbdkit: nbdkit("memory", "1M", "--filter=error", "error=EIO").

    Keyword arguments: tcp=True (on 127.0.0.1, or on host=...), tls="require" with psk=FILE or
    certificates=FOLDER.
    """
    started: list[servers.Server] = []

    def start(
        *args: str,
        tcp: bool = False,
        host: str = "127.0.0.1",
        tls: str | None = None,
        psk: Path | None = None,
        certificates: Path | None = None,
    ) -> servers.Server:
        argv = servers.nbdkit_argv(args, tls, psk, certificates)
        where = host if tcp else None
        scheme = "nbds" if tls else "nbd"
        started.append(servers.Server(argv, servers.short_folder(), where, scheme))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(nbdkit: servers.StartServer) -> servers.Server:
    """Return a server with an empty disk of 1 MiB."""
    return nbdkit("memory", "1M")


@pytest.fixture
def qemu_nbd() -> Iterator[servers.StartServer]:
    """Start qemu-nbd: qemu_nbd(image, "--format=qcow2", "--bitmap=bitmap0"), or with tcp=True."""
    started: list[servers.Server] = []

    def start(image: Path, *options: str, tcp: bool = False) -> servers.Server:
        argv = servers.qemu_nbd_argv(image, options)
        where = "127.0.0.1" if tcp else None
        started.append(servers.Server(argv, servers.short_folder(), where))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def made_qcow2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the image of dirty_qcow2 once, since that takes three programs."""
    return servers.dirty_qcow2(tmp_path_factory.mktemp("qcow2") / "dirty.qcow2")


@pytest.fixture
def dirty_qcow2(made_qcow2: Path, tmp_path: Path) -> Path:
    """Return a 1 MiB qcow2 image whose bitmap "bitmap0" has 64 KiB at 128 KiB dirty."""
    return Path(shutil.copy(made_qcow2, tmp_path))


@pytest.fixture
def nbd_server(tmp_path: Path) -> Callable[..., servers.NbdServer]:
    """Prepare nbd-server on a file of 1 MiB; pass nbd_server("-r").argv to connect_command."""

    def offer(*options: str, size: int = MIB) -> servers.NbdServer:
        path = tmp_path / "nbd-server.img"
        path.write_bytes(bytes(size))
        servers.program("nbd-server")
        return servers.NbdServer(path, options)

    return offer


@pytest.fixture
def psk(tmp_path: Path) -> Path:
    """Return a file of pre-shared keys for TLS, with the user alice."""
    return servers.psk_file(tmp_path / "keys.psk")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of X.509 certificates: a CA, the server localhost and the client alice."""
    return servers.certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def h() -> Iterator[nbd.NBD]:
    """Return a new handle that is not connected; it is closed after the test."""
    handle = nbd.NBD()
    yield handle
    close(handle)


@pytest.fixture
def disk(nbdkit: servers.StartServer, h: nbd.NBD) -> nbd.NBD:
    """Return a handle connected to an empty disk of 1 MiB, with base:allocation."""
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(nbdkit("memory", "1M").socket)
    return h


@pytest.fixture
def queue(disk: nbd.NBD) -> Iterator[Queue]:
    """Return a queue over an empty disk of 1 MiB."""
    with Queue(disk, depth=4, piece=64 * KIB) as made:
        yield made


@pytest.fixture
def opt(nbdkit: servers.StartServer, h: nbd.NBD) -> nbd.NBD:
    """Return a handle that is negotiating with an nbdkit that has a disk of 1 MiB."""
    h.set_opt_mode(True)
    h.connect_unix(nbdkit("memory", "1M").socket)
    return h


@pytest.fixture
def fs() -> Iterator[Any]:
    """Return the file system of fsspec, whose connections are closed after the test."""
    from nbd.fsspec import NBDFileSystem

    made = NBDFileSystem(timeout=servers.TIMEOUT, skip_instance_cache=True)
    yield made
    made._clients.close(wait=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two files of random bytes, "one" and "two 2"."""
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "one").write_bytes(os.urandom(100 * KIB))
    (folder / "two 2").write_bytes(os.urandom(4 * KIB))
    return folder


@pytest.fixture
def url(nbdkit: servers.StartServer, folder: Path) -> Callable[[str], str]:
    """Return a function that makes the URL of an export of the server of that folder."""
    server = nbdkit("file", f"dir={folder}")
    return lambda name: server.uri.replace("/?", f"/{name}?")


@pytest.fixture
def nothing_stays_registered() -> Iterator[None]:
    """Fail if a callable or a buffer is registered for libnbd after the test."""
    yield
    assert registered() == 0


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the exceptions that sys.unraisablehook receives during the test."""
    caught: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: caught.append(args.exc_value))
    return caught


def close(handle: nbd.NBD) -> None:
    """Close a handle, unless the test has already closed it."""
    with suppress(nbd.ClosedHandle):
        handle.close()
