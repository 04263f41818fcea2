"""nbd.aio.connect waits and resolves names in the event loop, and retries."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.asyncs import outcome, run
from support.servers import StartServer, listening_unix, program
from support.sizes import MIB
from support.usage import descriptors
from support.waits import paused

import nbd


async def size_of(uri: str | list[str], **options: Any) -> int:
    """Connect, and return the size of the disk."""
    async with nbd.aio.connect(uri, **options) as disk:
        assert len(await disk.pread(512, 0)) == 512
        return disk.get_size()


class Resolver(asyncio.SelectorEventLoop):
    """An event loop that records which names it has resolved."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:
        self.asked.append((host, port))
        if host == "disk.example":
            host = "127.0.0.1"
        return await super().getaddrinfo(host, port, **options)


def looked_up(uri: str, **options: Any) -> tuple[Any, list[Any]]:
    """Connect in a Resolver; return the size or the error, and the names it resolved."""
    loops: list[Resolver] = []

    def new_loop() -> Resolver:
        loops.append(Resolver())
        return loops[-1]

    return run(outcome(size_of(uri, **options)), new_loop), loops[0].asked


def test_a_server_on_tcp(nbdkit: StartServer) -> None:
    assert run(size_of(nbdkit("memory", "1M", tcp=True).uri)) == MIB


def test_a_server_on_ipv6(nbdkit: StartServer) -> None:
    assert run(size_of(nbdkit("memory", "1M", tcp=True, host="::1").uri)) == MIB


def test_an_address_is_not_looked_up(nbdkit: StartServer) -> None:
    assert looked_up(nbdkit("memory", "1M", tcp=True).uri) == (MIB, [])


def test_a_name_is_looked_up_by_the_loop(nbdkit: StartServer) -> None:
    port = nbdkit("memory", "1M", tcp=True).port
    assert looked_up(f"nbd://disk.example:{port}") == (MIB, [("disk.example", port)])


def test_the_next_address_of_a_name_is_tried(nbdkit: StartServer) -> None:
    port = nbdkit("memory", "1M", tcp=True).port  # localhost may be ::1 first
    assert looked_up(f"nbd://localhost:{port}")[0] == MIB


def test_an_unknown_name_is_an_error() -> None:
    error, asked = looked_up("nbd://nobody.invalid/")
    assert isinstance(error, nbd.Error)
    assert "nobody.invalid" in str(error)
    assert asked == [("nobody.invalid", 10809)]


def test_the_export_name_of_a_uri_is_kept(nbdkit: StartServer) -> None:
    server = nbdkit(
        "eval",
        "open=echo /$3",
        "get_size=[ $2 = /the-export ] && echo 2M || echo 1M",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
        tcp=True,
    )
    assert looked_up(f"nbd://disk.example:{server.port}/the-export")[0] == 2 * MIB


def test_tls_with_a_name_is_verified(nbdkit: StartServer, certificates: Path) -> None:
    server = nbdkit("memory", "1M", tcp=True, tls="require", certificates=certificates)

    def prepare(h: nbd.NBD) -> None:
        h.set_tls_certificates(str(certificates))

    good = f"nbds://localhost:{server.port}"
    assert run(size_of(good, prepare=prepare)) == MIB


def test_tls_with_a_name_is_verified_however_it_is_asked_for(
    nbdkit: StartServer, certificates: Path
) -> None:
    server = nbdkit("memory", "1M", tcp=True, tls="require", certificates=certificates)

    def prepare(h: nbd.NBD) -> None:
        h.set_tls(nbd.TLS_REQUIRE)
        h.set_tls_certificates(str(certificates))

    size, asked = looked_up(f"nbd://localhost:{server.port}", prepare=prepare)
    assert (size, asked) == (MIB, [])
    error, _ = looked_up(f"nbd://disk.example:{server.port}", prepare=prepare)
    assert isinstance(error, nbd.Error)


def test_tls_with_a_key(nbdkit: StartServer, psk: Path) -> None:
    server = nbdkit("memory", "1M", tls="require", psk=psk)

    def prepare(h: nbd.NBD) -> None:
        h.set_tls_psk_file(str(psk))
        h.set_tls_username("alice")

    async def main() -> bool:
        async with nbd.aio.connect(server.uri, prepare=prepare) as disk:
            await asyncio.gather(*(disk.pread(100_000, 0) for _ in range(20)))
            return disk.get_tls_negotiated()

    assert run(main())


def test_a_command_is_started_and_ended() -> None:
    assert run(size_of([program("nbdkit"), "-s", "memory", "1M"])) == MIB


def test_a_program_that_is_not_there_is_an_error() -> None:
    assert isinstance(run(outcome(size_of(["/nonexistent"]))), nbd.Error)


def test_a_server_that_is_not_there_is_an_error(tmp_sock: str) -> None:
    error = run(outcome(size_of(f"nbd+unix:///?socket={tmp_sock}")))
    assert isinstance(error, nbd.Error)
    assert error.errno == "ENOENT"


@pytest.mark.parametrize("uri", ["no uri", "nbd://[::1", "http://localhost", "nbd://host:x"])
def test_a_uri_that_is_none_is_an_error(uri: str) -> None:
    assert isinstance(run(outcome(size_of(uri))), nbd.Error)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"connections": 0}, ValueError),
        ({"connections": "1"}, TypeError),
        ({"depth": 0}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"retry_for": "1"}, TypeError),
        ({"contexts": "base:allocation"}, TypeError),
    ],
)
def test_bad_options_are_refused(nbdkit: StartServer, options: Any, kind: type[Exception]) -> None:
    uri = nbdkit("memory", "1M").uri

    async def main() -> None:
        with pytest.raises(kind):
            await size_of(uri, **options)

    run(main())


def test_a_uri_of_another_type_is_a_type_error() -> None:
    async def main() -> None:
        with pytest.raises(TypeError):
            await size_of(7)  # type: ignore[arg-type]

    run(main())


def test_it_is_tried_again_until_the_server_is_there(tmp_sock: str) -> None:
    async def main() -> int:
        connecting = asyncio.ensure_future(size_of(f"nbd+unix:///?socket={tmp_sock}", retry_for=20))
        await asyncio.sleep(0.05)
        with subprocess.Popen([program("nbdkit"), "-f", "-U", tmp_sock, "memory", "1M"]) as server:
            try:
                return await connecting
            finally:
                server.terminate()

    assert run(main()) == MIB


def test_a_silent_server_does_not_hold_up_the_loop_and_is_late(tmp_sock: str) -> None:
    async def main() -> int:
        turns = 0
        connecting = asyncio.ensure_future(
            outcome(size_of(f"nbd+unix:///?socket={tmp_sock}", timeout=0.2))
        )
        while not connecting.done():
            turns += 1
            await asyncio.sleep(0.005)
        assert isinstance(connecting.result(), nbd.Timeout)
        return turns

    with listening_unix(Path(tmp_sock)):
        assert run(main()) > 3


def test_a_server_that_hangs_up_is_an_error(tmp_sock: str) -> None:
    async def main() -> Any:
        connecting = asyncio.ensure_future(outcome(size_of(f"nbd+unix:///?socket={tmp_sock}")))
        listener.setblocking(False)
        accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        accepted.close()
        return await connecting

    with listening_unix(Path(tmp_sock)) as listener:
        error = run(main())
    assert isinstance(error, nbd.Error)


def test_an_exception_of_prepare_is_raised(nbdkit: StartServer) -> None:
    def prepare(h: nbd.NBD) -> None:
        raise LookupError

    assert isinstance(
        run(outcome(size_of(nbdkit("memory", "1M").uri, prepare=prepare))), LookupError
    )


def test_connections_that_fail_leave_no_descriptor(nbdkit: StartServer, tmp_sock: str) -> None:
    async def main() -> None:
        for _ in range(10):
            await outcome(size_of(f"nbd+unix:///?socket={tmp_sock}"))
            with paused(server):
                await outcome(size_of(server.uri, timeout=0.01))

    server = nbdkit("memory", "1M")
    run(main())
    before = descriptors()
    run(main())
    assert descriptors() == before


def test_a_port_that_refuses_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        error = run(outcome(size_of(f"nbd://127.0.0.1:{taken.getsockname()[1]}")))
    assert isinstance(error, nbd.Error)
    assert error.errno == "ECONNREFUSED"


def test_an_invalid_host_name_is_an_error() -> None:
    for host in ("a..b", "x" * 70, "-", "\udcff"):
        error = run(outcome(nbd.aio.connect(f"nbd://{host}", timeout=20).__aenter__()))
        assert isinstance(error, nbd.Error), (host, error)


def test_a_second_use_of_a_connect_is_refused_while_the_first_is_open(nbdkit: StartServer) -> None:
    async def main() -> None:
        connecting = nbd.aio.connect(nbdkit("memory", "1M").uri)
        async with connecting as disk:
            with pytest.raises(RuntimeError, match=r"call nbd\.aio\.connect again for a"):
                async with connecting:
                    pytest.fail("it was entered twice")
            with pytest.raises(RuntimeError, match="close its client first"):
                await connecting
            assert await disk.pread(512, 0) == bytes(512)
        async with connecting as disk:
            assert await disk.pread(512, 0) == bytes(512)
        disk = await connecting
        with pytest.raises(RuntimeError, match="is in use"):
            await connecting
        await disk.close()
        await (await connecting).close()

    run(main())
    before = descriptors()
    run(main())
    assert descriptors() == before


def test_a_second_use_at_the_same_time_is_refused(nbdkit: StartServer) -> None:
    async def main() -> None:
        connecting = nbd.aio.connect(nbdkit("memory", "1M").uri)
        ended = await asyncio.gather(*(outcome(connecting) for _ in range(3)))
        assert sorted(type(one).__name__ for one in ended) == [
            "Client",
            "RuntimeError",
            "RuntimeError",
        ]
        for one in ended:
            if isinstance(one, nbd.aio.Client):
                await one.close()

    run(main())


def test_a_connect_that_has_failed_can_be_used_again(tmp_sock: str, nbdkit: StartServer) -> None:
    async def main() -> None:
        server = nbdkit("memory", "1M")
        connecting = nbd.aio.connect(server.uri, timeout=0.2)
        with paused(server):
            assert isinstance(await outcome(connecting), nbd.Timeout)
        async with connecting as disk:
            assert disk.get_size() == MIB

    run(main())


def test_a_client_of_a_loop_that_has_ended_does_not_keep_its_connect(nbdkit: StartServer) -> None:
    connecting = nbd.aio.connect(nbdkit("memory", "1M").uri)

    async def main() -> nbd.aio.Client:
        return await connecting

    async def close() -> None:
        async with connecting as disk:
            assert disk.get_size() == MIB

    left = asyncio.run(main())
    asyncio.run(close())
    with pytest.warns(ResourceWarning):
        left.__del__()
