"""An annotated program that uses all of nbd.aio: `./run lint` checks it, and a test runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.asyncs import run
from support.servers import StartServer
from support.sizes import MIB

import nbd
import nbd.aio


async def everything(uri: str, path: Path) -> list[object]:
    """Use every method, with results whose types mypy knows."""
    seen: list[object] = []
    connecting: nbd.aio.Connecting = nbd.aio.connect(
        uri,
        connections=2,
        depth=8,
        timeout=20,
        retry_for=5,
        contexts=[nbd.CONTEXT_BASE_ALLOCATION],
        prepare=lambda h: h.set_handle_name("typed"),
    )
    async with connecting as disk:
        client: nbd.aio.Client = disk
        size: int = client.get_size()
        writable: bool = not client.is_read_only()
        block: int = client.get_block_size(nbd.SIZE_MINIMUM)
        name: str = client.get_export_name()
        contexts: bool = client.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        task: asyncio.Task[bytearray] = asyncio.create_task(client.pread(512, 0))
        data: bytearray = await task
        await client.pread_into(nbd.Buffer(512), 0, 0)
        await client.pwrite(b"x", 0, nbd.CMD_FLAG_FUA)
        await client.zero(512, 0)
        await client.trim(512, 0)
        await client.cache(512, 0)
        await client.flush()
        entries: list[int] = []

        def extent(
            context: str, offset: int, found: list[int], error: nbd.types.ErrorNumber
        ) -> int:
            entries.extend(found)
            return 0

        await client.block_status(MIB, 0, extent)
        single: AsyncIterator[nbd.Extent] = client.extents(start=0, end=size)
        flags: list[int] = [one.flags async for one in single]
        several: AsyncIterator[nbd.Extents] = client.extents([nbd.CONTEXT_BASE_ALLOCATION])
        pairs: list[tuple[int, ...]] = [one.flags async for one in several]
        copied: nbd.Copied = await nbd.aio.copy(client, path, progress=lambda done, total: None)
        seen += [size, writable, block, name, contexts, data, entries, flags, pairs, copied]
        seen += client.handles
    awaited: nbd.aio.Client = await nbd.aio.connect(uri)
    async with awaited:
        pass
    await awaited.close()
    return seen


def test_a_program_that_uses_everything_runs(nbdkit: StartServer, tmp_path: Path) -> None:
    seen = run(everything(nbdkit("memory", "1M").uri, tmp_path / "copy"))
    assert seen[:2] == [MIB, True]
    assert len(seen) in (11, 12)  # the second connection may join later


def test_a_str_for_a_number_is_found_wrong_by_mypy(nbdkit: StartServer) -> None:
    async def main() -> None:
        async with nbd.aio.connect(nbdkit("memory", "1M").uri) as disk:
            with pytest.raises(TypeError):
                await disk.pread("512", 0)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                disk.get_size(1)  # type: ignore[call-arg]

    run(main())
