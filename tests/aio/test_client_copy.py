"""nbd.aio.copy copies what nbd.copy copies, while the event loop keeps running."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from support.asyncs import commands, outcome, run, until
from support.programs import run_program
from support.servers import StartServer, children, program
from support.sizes import KIB, MIB
from support.usage import descriptors, registered
from support.waits import paused

import nbd


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 20 MiB with data and holes."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(20 * MIB)
        for start in range(0, 20 * MIB, 5 * MIB):
            file.seek(start)
            file.write(random.Random(start).randbytes(MIB))
    return path


def test_from_a_file_to_a_server_and_back(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    uri = nbdkit("memory", "20M").uri

    async def main() -> nbd.Copied:
        there = await nbd.aio.copy(image, uri)
        await nbd.aio.copy(uri, tmp_path / "copy")
        return there

    assert run(main()) == nbd.Copied(4 * MIB, 16 * MIB)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_from_a_server_to_another(nbdkit: StartServer, image: Path) -> None:
    source, target = nbdkit("file", str(image)), nbdkit("memory", "20M")
    assert sum(run(nbd.aio.copy(source.uri, target.uri))) == 20 * MIB
    with nbd.open(target.uri) as file:
        assert file.read() == image.read_bytes()


def test_clients_are_copied_over_their_own_connections(nbdkit: StartServer, image: Path) -> None:
    async def main() -> bytearray:
        kit = program("nbdkit")
        async with (
            nbd.aio.connect([kit, "-s", "file", str(image)]) as source,
            nbd.aio.connect([kit, "-s", "memory", "20M"]) as target,
        ):
            await nbd.aio.copy(source, target)
            return await target.pread(20 * MIB, 0)

    assert run(main()) == image.read_bytes()


def test_a_client_may_be_used_meanwhile(nbdkit: StartServer, image: Path) -> None:
    slow = nbdkit("--filter=delay", "file", str(image), "rdelay=5ms")

    async def main() -> int:
        async with nbd.aio.connect(slow.uri) as source:
            copying = asyncio.ensure_future(nbd.aio.copy(source, ["nbdkit", "-s", "memory", "20M"]))
            reads = 0
            while not copying.done():
                assert await source.pread(512, 0) == first
                reads += 1
            await copying
            return reads

    first = image.read_bytes()[:512]
    assert run(main()) > 0


def test_a_copy_of_a_client_that_is_closed_meanwhile_fails(
    nbdkit: StartServer, tmp_path: Path
) -> None:
    server = nbdkit("--filter=delay", "memory", "1M", "rdelay=200ms")

    async def main() -> Any:
        async with nbd.aio.connect(server.uri) as disk:
            copy = nbd.aio.copy(disk, tmp_path / "copy", sparse=False)
            copying = asyncio.ensure_future(outcome(copy))
            await until(lambda: commands(disk))
        return await copying

    error = run(main())
    assert isinstance(error, nbd.Error)
    assert error.errno in ("ENOTCONN", "ECONNRESET", "EPIPE", "ESHUTDOWN")


def test_to_and_from_a_stream(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    uri, stream = nbdkit("memory", "20M").uri, io.BytesIO()

    async def main() -> None:
        await nbd.aio.copy(io.BytesIO(image.read_bytes()), uri)
        with gzip.open(tmp_path / "copy.gz", "wb", 1) as file:
            await nbd.aio.copy(uri, file)
        await nbd.aio.copy(uri, stream)

    run(main())
    assert stream.getvalue() == image.read_bytes()
    with gzip.open(tmp_path / "copy.gz") as file:
        assert file.read() == image.read_bytes()


def test_progress_is_called_in_the_loop(image: Path, tmp_path: Path) -> None:
    reported: list[Any] = []

    def progress(done: int, total: int | None) -> None:
        reported.append((threading.current_thread(), done, total))

    run(nbd.aio.copy(image, tmp_path / "copy", progress=progress))
    assert reported[-1] == (threading.main_thread(), 20 * MIB, 20 * MIB)
    assert {one[0] for one in reported} == {threading.main_thread()}


def test_an_exception_of_progress_is_raised(image: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int | None) -> None:
        raise LookupError

    assert isinstance(
        run(outcome(nbd.aio.copy(image, tmp_path / "copy", progress=progress))), LookupError
    )


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        ("/nonexistent", "copy", OSError),
        ("nbd+unix:///?socket=/nonexistent", "copy", nbd.Error),
        ("image", "nbd+unix:///?socket=/nonexistent", nbd.Error),
        ("image", 7, TypeError),
        ("image", "image", ValueError),
    ],
)
def test_what_cannot_be_copied_fails_as_with_nbd_copy(
    image: Path, tmp_path: Path, source: Any, target: Any, kind: type[Exception]
) -> None:
    source, target = (
        str(tmp_path / one) if one in ("image", "copy") else one for one in (source, target)
    )
    with pytest.raises(kind):
        nbd.copy(source, target)
    assert isinstance(run(outcome(nbd.aio.copy(source, target))), kind)


def test_a_smaller_target_is_refused(nbdkit: StartServer, image: Path) -> None:
    error = run(outcome(nbd.aio.copy(image, nbdkit("memory", "1M").uri)))
    assert isinstance(error, nbd.Error)
    assert error.errno == "ENOSPC"


def test_an_error_of_the_server_names_its_side(nbdkit: StartServer, tmp_path: Path) -> None:
    server = nbdkit("--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=1")
    error = run(outcome(nbd.aio.copy(server.uri, tmp_path / "copy", sparse=False)))
    assert isinstance(error, nbd.Error)
    assert "reading the source failed" in str(error)


async def cancel_when(task: asyncio.Task[Any], reached: Callable[[], object]) -> None:
    """Cancel a task once a condition holds; it ends within one iteration of the loop."""
    await until(reached)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert task.cancelled()


def copies() -> list[threading.Thread]:
    """Return the threads of running copies."""
    return [one for one in threading.enumerate() if one.name.startswith("nbd.aio.copy")]


@pytest.mark.parametrize("is_client", [False, True])
def test_a_copy_that_is_cancelled_ends_at_once(
    nbdkit: StartServer, tmp_path: Path, is_client: bool
) -> None:
    # The client's commands stay in flight, and are answered in parallel.  Those of a closed
    # connection are abandoned: see servers.nbdkit_argv.
    threads = "--threads=32" if is_client else "--threads=1"
    server = nbdkit("--filter=delay", "memory", "64M", "rdelay=1", threads)

    async def main() -> None:
        async with nbd.aio.connect(server.uri) as disk:
            await disk.pwrite(b"x" * (32 * MIB), 0)
            source: Any = disk if is_client else server.uri
            copying = asyncio.ensure_future(nbd.aio.copy(source, tmp_path / "copy"))
            await until(copies)
            await asyncio.sleep(0.1)
            await cancel_when(copying, copies)
            await until(lambda: not copies())
            assert await disk.pread(1, 0) == b"x"

    run(main())
    before = descriptors()
    run(main())
    assert descriptors() == before


def test_a_copy_that_is_cancelled_does_not_wait_for_the_end_of_its_server(tmp_path: Path) -> None:
    shell = f"{program('nbdkit')} -s --filter=delay memory 1M rdelay=30; exec sleep 60"

    async def main() -> float:
        copying = asyncio.ensure_future(
            nbd.aio.copy(["sh", "-c", shell], tmp_path / "copy", sparse=False)
        )
        await until(copies)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await cancel_when(copying, copies)
        late = time.monotonic() - began
        await until(lambda: not copies())
        return late

    others = set(children())
    try:
        assert run(main()) < 20  # seconds: the server ends after 60
    finally:
        for process in set(children()) - others:
            os.kill(process, signal.SIGKILL)
    run(until(lambda: not registered()))


def test_a_copy_from_a_stream_that_is_cancelled_ends_with_the_next_bytes(
    nbdkit: StartServer,
) -> None:
    uri = nbdkit("memory", "64M").uri

    async def main() -> None:
        read, write = os.pipe()
        with open(read, "rb") as source, open(write, "wb", 0) as sink:
            copying = asyncio.ensure_future(nbd.aio.copy(source, uri))
            sink.write(b"x" * KIB)
            await cancel_when(copying, copies)
            sink.write(b"x" * KIB)
            sink.close()
            await until(lambda: not copies())

    run(main())


def test_a_connect_of_a_copy_that_is_cancelled_leaves_nothing(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M")

    async def main() -> None:
        with paused(server):
            source = [program("nbdkit"), "-s", "memory", "1M"]
            copying = asyncio.ensure_future(nbd.aio.copy(source, server.uri))
            await asyncio.sleep(0.1)
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying

    started = set(children())
    run(main())
    assert set(children()) <= started


CANCELLED = """
import asyncio, nbd, os, signal, sys

async def main():
    if len(sys.argv) > 3:
        os.kill(int(sys.argv[3]), signal.SIGCONT)
    copying = asyncio.ensure_future(nbd.aio.copy(*sys.argv[1:3]))
    await asyncio.sleep(0.3)
    if len(sys.argv) > 3:
        os.kill(int(sys.argv[3]), signal.SIGSTOP)
        await asyncio.sleep(0.3)
    assert not copying.done()
    copying.cancel()
    await asyncio.wait([copying], timeout=1)
    print(copying.cancelled())

asyncio.run(main())
"""


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_program_ends_whose_copy_of_a_fifo_was_cancelled(
    nbdkit: StartServer, tmp_path: Path, side: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    sides = (str(tmp_path / "fifo"), nbdkit("memory", "1M").uri)
    done = run_program(CANCELLED, *(sides if side == "source" else sides[::-1]))
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_program_ends_whose_copy_from_a_server_that_hangs_was_cancelled(
    nbdkit: StartServer, tmp_path: Path, is_stream: bool
) -> None:
    server = nbdkit("--filter=delay", "pattern", "64M", "rdelay=100ms")
    target = str(tmp_path / "copy")
    if is_stream:
        target = "/dev/stderr"
        done = run_program(CANCELLED, server.uri, target, str(server.process.pid))
        assert "Traceback" not in done.stderr
    else:
        done = run_program(CANCELLED, server.uri, target, str(server.process.pid))
        assert done.stderr == ""
    assert (done.stdout, done.returncode) == ("True\n", 0)


def test_the_copy_begins_on_the_first_connection(qemu_nbd: StartServer, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"x" * (20 * MIB))
    server = qemu_nbd(image, "--format=raw", "--shared=2")

    async def main() -> nbd.Copied:
        async with nbd.aio.connect(server.uri):
            return await asyncio.wait_for(
                nbd.aio.copy(server.uri, tmp_path / "copy", connections=4), 15
            )

    assert sum(run(main())) == 20 * MIB
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


#: Reads in the second MiB fail.
BAD = (
    "eval",
    "get_size=echo 4M",
    "pread=if [ $4 -lt 2097152 ] && [ $(($4 + $3)) -gt 1048576 ]; then echo EIO bad >&2; exit 1; "
    "fi; head -c $3 /dev/zero | tr '\\0' x",
)


BLOCKS = ("blocksize-minimum=65536", "blocksize-preferred=65536", "blocksize-maximum=16M")


def test_on_error_is_asked_in_the_event_loop(nbdkit: StartServer, tmp_path: Path) -> None:
    reported: list[tuple[Any, int, int, str | None]] = []

    def on_error(offset: int, length: int, error: nbd.Error) -> bool:
        reported.append((threading.current_thread(), offset, length, error.errno))
        return True

    server = nbdkit("--filter=blocksize-policy", *BAD, *BLOCKS)
    copied = run(nbd.aio.copy(server.uri, tmp_path / "copy", on_error=on_error))
    assert copied.bad == ((MIB, MIB),)
    assert {one[0] for one in reported} == {threading.main_thread()}
    assert {one[3] for one in reported} == {"EIO"}
    data = (tmp_path / "copy").read_bytes()
    assert data == b"x" * MIB + bytes(MIB) + b"x" * (2 * MIB)


def test_on_error_may_refuse_or_raise(nbdkit: StartServer, tmp_path: Path) -> None:
    def refuse(*_: object) -> bool:
        return False

    def fail(*_: object) -> bool:
        raise LookupError

    server = nbdkit(*BAD)
    error = run(outcome(nbd.aio.copy(server.uri, tmp_path / "copy", on_error=refuse)))
    assert isinstance(error, nbd.Error)
    assert error.errno == "EIO"
    error = run(outcome(nbd.aio.copy(server.uri, tmp_path / "copy", on_error=fail)))
    assert isinstance(error, LookupError)


@pytest.mark.parametrize("option", ["progress", "on_error"])
def test_coroutine_functions_are_refused(tmp_path: Path, option: str) -> None:
    async def function(*_: object) -> bool:
        return True

    options: Any = {option: function}
    error = run(outcome(nbd.aio.copy("/dev/null", tmp_path / "copy", **options)))
    assert isinstance(error, TypeError)
    assert f"{option}: a function is needed" in str(error)


def test_stop_iteration_of_a_file_ends_the_copy(tmp_path: Path) -> None:
    class Odd(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise StopIteration

    error = run(outcome(nbd.aio.copy(Odd(), tmp_path / "copy")))
    assert isinstance(error, RuntimeError)


def test_the_granularity_of_zeroes_is_passed_on(nbdkit: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes((b"x" + bytes(4095)) * 4 + bytes(65536 - 16384))
    uri = nbdkit("--filter=noextents", "file", str(path)).uri
    for sparse, copied in ((512, 4 * 512), (True, 16384), (65536, 65536), (False, 65536)):
        result = run(nbd.aio.copy(uri, tmp_path / "copy", sparse=sparse))
        assert (result, result.read, result.written) == ((copied, 65536 - copied), 65536, copied)
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert isinstance(run(outcome(nbd.aio.copy(uri, tmp_path / "copy", sparse=1000))), ValueError)


def test_a_target_that_is_zero_is_not_sent_zeroes(
    nbdkit: StartServer, image: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    server = nbdkit("--filter=log", "memory", "20M", f"logfile={log}")
    result = run(nbd.aio.copy(image, server.uri, target_is_zero=True))
    assert (result, result.written) == ((4 * MIB, 16 * MIB), 4 * MIB)
    assert " Zero " not in log.read_text()
    with nbd.open(server.uri) as file:
        assert file.read() == image.read_bytes()


def test_ranges_of_a_client_are_copied(nbdkit: StartServer, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(b"x" * 20 * MIB)
    calls: list[tuple[int, int | None]] = []

    async def main() -> nbd.Copied:
        async with nbd.aio.connect(nbdkit("file", str(image)).uri) as disk:
            extents = [extent async for extent in disk.extents()]
            ranges = [extent for extent in extents if not extent.flags & nbd.STATE_ZERO]
            return await nbd.aio.copy(
                disk, copy, ranges=ranges, progress=lambda *call: calls.append(call)
            )

    assert run(main()) == (4 * MIB, 0)
    assert calls[-1] == (4 * MIB, 4 * MIB)
    data, content = image.read_bytes(), copy.read_bytes()
    for start in range(0, 20 * MIB, 5 * MIB):
        assert content[start : start + MIB] == data[start : start + MIB]
        assert content[start + MIB : start + 5 * MIB] == b"x" * 4 * MIB


def test_ranges_that_are_wrong_fail_as_with_nbd_copy(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for ranges, kind in (([(0, 21 * MIB)], ValueError), ([(-1, 1)], ValueError), ([1], TypeError)):
        wrong: Any = ranges
        assert isinstance(run(outcome(nbd.aio.copy(image, copy, ranges=wrong))), kind)


def test_a_disk_is_read_and_discarded(nbdkit: StartServer, image: Path) -> None:
    async def main() -> nbd.Copied:
        async with nbd.aio.connect(nbdkit("file", str(image)).uri) as disk:
            return await nbd.aio.copy(disk, None)

    for result in (run(main()), run(nbd.aio.copy(image, None))):
        assert (result, result.read, result.written) == ((4 * MIB, 16 * MIB), 4 * MIB, 0)
    nothing: Any = None
    assert isinstance(run(outcome(nbd.aio.copy(nothing, None))), TypeError)


def test_a_copy_to_nowhere_that_is_cancelled_ends_at_once(nbdkit: StartServer) -> None:
    server = nbdkit("--filter=delay", "memory", "64M", "rdelay=1")

    async def main() -> None:
        copying = asyncio.ensure_future(nbd.aio.copy(server.uri, None, sparse=False))
        await until(copies)
        await cancel_when(copying, copies)
        await until(lambda: not copies())

    run(main())
