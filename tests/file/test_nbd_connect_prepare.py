"""The URI does not silently replace the settings that `prepare` made on the handle."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Callable
from urllib.parse import quote

import pytest
from support.asyncs import run
from support.servers import StartServer, program

import nbd
from nbd._disks import connect as connecting

#: A plugin whose disk has one sector more than its export name has bytes.
BY_NAME = (
    "eval",
    'open=printf %s "$3" | wc -c',
    "get_size=echo $(($2 * 512 + 512))",
    "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
)


def sectors(name: str) -> int:
    """Return the size of that export of the plugin in sectors."""
    return len(name.encode("utf-8", "surrogateescape")) + 1


def connect(uri: Any, **options: Any) -> tuple[int, str]:
    """Connect with nbd.connect; return the size in sectors and the export name."""
    with nbd.connect(uri, timeout=10, **options) as h:
        return h.get_size() // 512, h.get_export_name()


def connect_in_a_loop(uri: Any, **options: Any) -> tuple[int, str]:
    """Do the same with nbd.aio.connect."""

    async def main() -> tuple[int, str]:
        async with nbd.aio.connect(uri, timeout=10, **options) as disk:
            return disk.get_size() // 512, disk.get_export_name()

    return run(main())


both = pytest.mark.parametrize("connected", [connect, connect_in_a_loop])

NAMES = ["disk2", "a/b/../c", "/abs", "a b?x=1&y;#%20", "ä", "\udcff", "..", "@:[]", "'\"\\"]


@both
@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("name", NAMES)
def test_an_export_name_that_is_set_counts_over_tcp(
    nbdkit: StartServer, connected: Callable[..., Any], end: str, name: str
) -> None:
    uri = nbdkit(*BY_NAME, tcp=True).uri + end
    assert connected(uri, prepare=lambda h: h.set_export_name(name)) == (sectors(name), name)


@both
@pytest.mark.parametrize("name", NAMES)
def test_an_export_name_that_is_set_counts_over_a_unix_socket(
    nbdkit: StartServer, connected: Callable[..., Any], name: str
) -> None:
    server = nbdkit(*BY_NAME)
    for uri in (server.uri, server.uri.replace(":///?", "://?")):
        assert connected(uri, prepare=lambda h: h.set_export_name(name)) == (sectors(name), name)


@both
def test_an_export_name_that_is_set_counts_for_a_host_with_a_name(
    nbdkit: StartServer, connected: Callable[..., Any]
) -> None:
    uri = f"nbd://localhost:{nbdkit(*BY_NAME, tcp=True).port}"
    assert connected(uri, prepare=lambda h: h.set_export_name("disk2")) == (6, "disk2")


@both
def test_an_export_name_that_is_set_counts_for_a_command(connected: Callable[..., Any]) -> None:
    command = [program("nbdkit"), "-s", *BY_NAME]
    assert connected(command, prepare=lambda h: h.set_export_name("disk2")) == (6, "disk2")


@both
def test_the_name_of_a_uri_counts_where_none_is_set(
    nbdkit: StartServer, connected: Callable[..., Any]
) -> None:
    server = nbdkit(*BY_NAME)
    for name in NAMES:
        uri = server.uri.replace(":///", f":///{quote(name, '', errors='surrogateescape')}")
        assert connected(uri) == (sectors(name), name)
        assert connected(uri, prepare=lambda h: None) == (sectors(name), name)


@both
def test_the_same_name_may_be_given_twice(
    nbdkit: StartServer, connected: Callable[..., Any]
) -> None:
    uri = nbdkit(*BY_NAME).uri.replace(":///", ":///a%2Fb%20c")
    assert connected(uri, prepare=lambda h: h.set_export_name("a/b c")) == (6, "a/b c")


@both
def test_two_names_are_refused(nbdkit: StartServer, connected: Callable[..., Any]) -> None:
    uri = nbdkit(*BY_NAME).uri.replace(":///", ":///disk1")
    with pytest.raises(ValueError, match=r"name 'disk1', and prepare .*'disk2'.*leave out one"):
        connected(uri, prepare=lambda h: h.set_export_name("disk2"))


@both
def test_every_connection_has_the_name(nbdkit: StartServer, connected: Callable[..., Any]) -> None:
    def prepare(h: nbd.NBD) -> None:
        h.set_export_name("disk2")

    async def main() -> set[str]:
        async with nbd.aio.connect(uri, connections=3, prepare=prepare) as disk:
            while len(disk.handles) < 3:
                await asyncio.sleep(0.001)
            return {handle.get_export_name() for handle in disk.handles}

    uri = nbdkit("memory", "1M").uri
    assert run(main()) == {"disk2"}


@pytest.mark.parametrize(
    ("uri", "name", "expected"),
    [
        ("nbd://host", "", "nbd://host"),
        ("nbd://host", "x", "nbd://host/x"),
        ("nbd://host/", "x", "nbd://host/x"),
        ("nbd://host:10809", "x", "nbd://host:10809/x"),
        ("nbd://[::1]:10809/", "x/y", "nbd://[::1]:10809/x%2Fy"),
        ("nbds://alice@host/", "x", "nbds://alice@host/x"),
        ("nbd+unix:///?socket=/a/b", "x", "nbd+unix:///x?socket=/a/b"),
        ("nbds+unix://alice@?socket=/a", "x", "nbds+unix://alice@/x?socket=/a"),
        ("nbd+vsock://3:10809", "x", "nbd+vsock://3:10809/x"),
        ("nbd+vsock:///", "x", "nbd+vsock:///x"),
        ("NBD+Unix:///?socket=/a", "", "nbd+unix:///?socket=/a"),
        ("no uri", "x", "no uri"),
        ("http://host", "x", "http://host"),
    ],
)
def test_the_name_is_put_into_the_uri(uri: str, name: str, expected: str) -> None:
    assert connecting.agreed(uri, name, {}) == expected


@both
def test_a_scheme_has_no_case(nbdkit: StartServer, connected: Callable[..., Any]) -> None:
    assert connected(nbdkit(*BY_NAME, tcp=True).uri.replace("nbd:", "NBD:")) == (1, "")


@both
@pytest.mark.parametrize("uri", ["nbd://host/disk#1", "nbd+unix:///disk?socket=/tmp/a#b"])
def test_a_part_that_libnbd_would_ignore_is_refused(
    connected: Callable[..., Any], uri: str
) -> None:
    with pytest.raises(ValueError, match="write %23"):
        connected(uri)


@both
@pytest.mark.parametrize(
    ("setter", "value", "query"),
    [
        ("set_tls_certificates", "/nowhere", "tls-certificates=/elsewhere"),
        ("set_tls_psk_file", "/nowhere", "tls-psk-file=/elsewhere"),
        ("set_tls_psk_file", "/nowhere", "tls%2Dpsk-file=/elsewhere"),
        ("set_tls_verify_peer", True, "tls-verify-peer=false"),
    ],
)
def test_what_is_set_of_tls_is_not_replaced(
    nbdkit: StartServer, connected: Callable[..., Any], setter: str, value: Any, query: str
) -> None:
    def prepare(h: nbd.NBD) -> None:
        h.set_uri_allow_local_file(True)
        getattr(h, setter)(value)

    uri = nbdkit("memory", "1M").uri.replace("nbd", "nbds", 1)
    with pytest.raises(ValueError, match=f"prepare has called {setter}: leave out one of the two"):
        connected(f"{uri}&{query}", prepare=prepare)


@both
def test_a_user_name_that_is_set_is_not_replaced(
    nbdkit: StartServer, connected: Callable[..., Any], psk: Path
) -> None:
    def prepare(h: nbd.NBD) -> None:
        h.set_tls_psk_file(str(psk))
        h.set_tls_username("alice")

    uri = nbdkit("memory", "1M", tls="require", psk=psk).uri
    assert connected(uri, prepare=prepare) == (2048, "")
    assert connected(uri.replace("://", "://alice@"), prepare=prepare) == (2048, "")
    with pytest.raises(ValueError, match="the user name 'bob', and prepare has called set_tls_us"):
        connected(uri.replace("://", "://bob@"), prepare=prepare)


@both
def test_tls_that_is_required_stays_required(
    nbdkit: StartServer, connected: Callable[..., Any]
) -> None:
    with pytest.raises(nbd.Error):
        connected(
            nbdkit("memory", "1M", tls="off").uri, prepare=lambda h: h.set_tls(nbd.TLS_REQUIRE)
        )


def test_a_timeout_that_is_set_stays(nbdkit: StartServer) -> None:
    uri = nbdkit("memory", "1M").uri
    with nbd.connect(uri, prepare=lambda h: h.settimeout(5)) as h:
        assert h.gettimeout() == 5
    with nbd.connect(uri, timeout=6, prepare=lambda h: h.settimeout(5)) as h:
        assert h.gettimeout() == 6


def test_the_option_mode_stays_and_the_name_with_it(nbdkit: StartServer) -> None:
    def prepare(h: nbd.NBD) -> None:
        h.set_opt_mode(True)
        h.set_export_name("disk2")

    with nbd.connect(nbdkit(*BY_NAME).uri, prepare=prepare) as h:
        assert h.aio_is_negotiating()
        h.opt_go()
        assert h.get_size() == 6 * 512


def test_nbd_aio_refuses_the_option_mode(nbdkit: StartServer) -> None:
    with pytest.raises(ValueError, match=r"prepare: it has called set_opt_mode.*leave that out"):
        connect_in_a_loop(nbdkit(*BY_NAME).uri, prepare=lambda h: h.set_opt_mode(True))


def test_a_handle_is_the_same_while_it_is_prepared(nbdkit: StartServer) -> None:
    prepared: list[nbd.NBD] = []
    with nbd.connect(nbdkit("memory", "1M").uri, prepare=prepared.append) as h:
        assert prepared == [h]
        assert type(h) is nbd.NBD
        assert vars(h).keys() == vars(nbd.NBD()).keys()
