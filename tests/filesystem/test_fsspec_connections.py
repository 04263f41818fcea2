# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec: connections are kept, closed, and never shared with another loop or process."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

import fsspec
import pytest
from support.asyncs import run, until
from support.programs import run_silently
from support.servers import TIMEOUT, Server, StartServer
from support.signals import Stop, alarm
from support.sizes import MIB
from support.waits import paused

from nbd.fsspec import NBDFileSystem, _clients


def sockets() -> int:
    """Return how many sockets this process has open."""
    gc.collect()
    links = (str(os.readlink(one)) for one in list_descriptors())
    return sum(link.startswith("socket:") for link in links)


def list_descriptors() -> list[Path]:
    return [one for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < deadline, "it was not reached"
        time.sleep(0.001)


def kept(fs: Any) -> list[str]:
    """Return the URLs of the connections that a file system keeps."""
    return [url for clients in list(fs._clients._by_loop.values()) for url in clients._kept]


def test_a_connection_is_used_again(fs: Any, server: Server) -> None:
    fs.cat_file(server.uri, 0, 1)
    (clients,) = fs._clients._by_loop.values()
    before = clients._kept[server.uri]
    fs.cat_file(server.uri, 0, 1)
    assert clients._kept == {server.uri: before}


def test_an_unused_connection_is_closed(
    fs: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_clients, "IDLE", 0.01)
    fs.info(server.uri)
    wait_until(lambda: not kept(fs))
    assert fs.size(server.uri) == MIB


def test_connections_are_closed_on_demand(fs: Any, server: Server) -> None:
    fs.info(server.uri)
    fs.invalidate_cache("nbd://other")
    fs.invalidate_cache(server.uri)
    wait_until(lambda: not kept(fs))
    fs.info(server.uri)
    fs.invalidate_cache()
    wait_until(lambda: not kept(fs))


def test_a_dropped_file_system_closes_its_connections(server: Server) -> None:
    fs = fsspec.filesystem("nbd", skip_instance_cache=True)
    fs.info(server.uri)
    clients = fs._clients
    del fs
    gc.collect()
    (of_loop,) = clients._by_loop.values()
    wait_until(lambda: not of_loop._kept and not of_loop._closing)


def test_a_server_with_one_client_can_be_opened_after_info(
    fs: Any, qemu_nbd: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(b"1" * MIB)
    server = qemu_nbd(tmp_path / "image", "--format=raw", "--shared=1")
    fs.info(server.uri)
    with fs.open(server.uri) as file:
        assert file.read(3) == b"111"


def test_a_lost_connection_is_made_again(fs: Any, nbdkit: StartServer, tmp_path: Path) -> None:
    first, second = nbdkit("memory", "1M"), nbdkit("memory", "2M")
    assert fs.size(first.uri) == MIB
    first.kill()
    Path(first.socket).unlink()
    Path(first.socket).symlink_to(second.socket)
    (clients,) = fs._clients._by_loop.values()
    wait_until(clients._kept[first.uri].is_useless)
    assert fs.size(first.uri) == 2 * MIB


def test_each_loop_has_its_connections_and_closes_them_at_its_end(server: Server) -> None:
    fs = fsspec.filesystem("nbd", asynchronous=True, skip_instance_cache=True)
    before = sockets()
    for _ in range(3):
        assert asyncio.run(fs._size(server.uri)) == MIB
        assert sockets() == before
    assert kept(fs) == []


def test_a_cancelled_call_ends_and_others_continue(server: Server) -> None:
    async def main() -> None:
        fs = fsspec.filesystem("nbd", asynchronous=True, skip_instance_cache=True)
        await fs._info(server.uri)
        with paused(server):
            reads = [asyncio.ensure_future(fs._cat_file(server.uri, 0, 4)) for _ in range(2)]
            await asyncio.sleep(0)
            reads[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await reads[0]
        assert await reads[1] == bytes(4)

    run(main())


def test_a_cancelled_connecting_leaves_nothing(server: Server) -> None:
    async def main() -> None:
        fs = fsspec.filesystem("nbd", asynchronous=True, skip_instance_cache=True)
        with paused(server):
            call = asyncio.ensure_future(fs._info(server.uri))
            await until(lambda: kept(fs))
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        await until(lambda: not kept(fs))
        assert await fs._size(server.uri) == MIB

    run(main())


@pytest.mark.parametrize("name", ["info", "cat_file", "ls", "open"])
def test_a_server_that_does_not_answer_times_out(server: Server, name: str) -> None:
    fs = fsspec.filesystem("nbd", timeout=0.1, skip_instance_cache=True)
    with paused(server), pytest.raises(TimeoutError) as caught:
        getattr(fs, name)(server.uri)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ETIMEDOUT
    assert server.uri in str(caught.value)


def test_ctrl_c_ends_a_call(fs: Any, server: Server) -> None:
    def handler(*_: object) -> None:
        raise Stop

    with paused(server), alarm(handler), pytest.raises(Stop):
        fs.info(server.uri)
    wait_until(lambda: not kept(fs))
    assert fs.size(server.uri) == MIB


def test_threads_share_a_file_system(fs: Any, nbdkit: StartServer) -> None:
    uri = nbdkit("--threads=4", "pattern", "1M").uri
    wrong: list[int] = []

    def work(first: int) -> None:
        for at in range(first * 8, 8000, 64):
            if fs.cat_file(uri, at, at + 8) != at.to_bytes(8, "big"):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert kept(fs) == [uri]


def test_a_pickled_instance_has_the_options_and_no_connection(server: Server) -> None:
    fs = fsspec.filesystem("nbd", timeout=TIMEOUT, connections=2)
    fs.info(server.uri)
    data = pickle.dumps(fs)
    NBDFileSystem.clear_instance_cache()
    again = pickle.loads(data)
    assert again is not fs
    assert again.storage_options == {"timeout": TIMEOUT, "connections": 2}
    assert again == fs
    assert kept(again) == []
    assert again.size(server.uri) == MIB
    again._clients.close(wait=True)
    fs._clients.close(wait=True)


SPAWN = """
import fsspec, multiprocessing, sys

def first_bytes(file):
    with file as disk:
        return disk.read(8)

if __name__ == "__main__":
    file = fsspec.open(sys.argv[1], timeout=20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first_bytes, (file,)) == bytes(8)
"""


def test_a_spawned_process_reads_an_open_file_that_was_sent_to_it(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(SPAWN)
    command = [sys.executable, str(program), nbdkit("pattern", "1M").uri]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=3 * TIMEOUT)
    assert (done.returncode, done.stderr) == (0, b"")


FORK = """
import fsspec, gc, os, sys, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
uri = sys.argv[1]
fs = fsspec.filesystem("nbd", timeout=20)
fs.cat_file(uri, 0, 8)
child = os.fork()
if not child:
    status = 1
    try:
        assert fs.cat_file(uri, 8, 16)[-1] == 8
        assert fsspec.filesystem("nbd", timeout=20).cat_file(uri, 16, 24)[-1] == 16
        fs.invalidate_cache()
        del fs
        gc.collect()
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
assert fs.cat_file(uri, 24, 32)[-1] == 24
"""


def test_the_child_of_a_fork_makes_its_own_connections(nbdkit: StartServer) -> None:
    run_silently(FORK, nbdkit("--threads=4", "pattern", "1M").uri)


def test_a_program_ends_with_kept_connections(server: Server) -> None:
    run_silently(
        "import fsspec, sys; fsspec.filesystem('nbd').info(sys.argv[1])",
        server.uri,
    )
