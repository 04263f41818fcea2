# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec.NBDFileSystem."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, BinaryIO, Callable
from weakref import finalize

from fsspec.asyn import AsyncFileSystem, get_loop
from fsspec.spec import AbstractFileSystem

from nbd.fsspec._clients import DEPTH, Clients, _Kept
from nbd.fsspec._exports import Exports, described
from nbd.fsspec._options import Options, naming, read_only
from nbd.fsspec._url import SCHEMES, Url, split

#: A read or write is cut into requests of at most this many bytes.
_PIECE = 1024 * 1024


class NBDFileSystem(AsyncFileSystem):  # type: ignore[misc] # fsspec has no annotations
    """The exports of NBD servers as the files of fsspec.

    A path is the URI of an export, such as nbd://server/disk.  ...
    """

    protocol = SCHEMES
    cachable = True

    def __init__(
        self,
        *,
        connections: int = 1,
        timeout: float | None = None,
        reconnect: float | None = None,
        retry_for: float | None = None,
        tls_certificates: str | None = None,
        tls_psk_file: str | None = None,
        tls_username: str | None = None,
        tls_verify_peer: bool | None = None,
        uri_allow_local_file: bool | None = None,
        asynchronous: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
        batch_size: int | None = None,
    ) -> None:
        if self._cached:
            return
        super().__init__(asynchronous=asynchronous, loop=loop, batch_size=batch_size)
        self._options = Options(
            {
                "connections": connections,
                "timeout": timeout,
                "reconnect": reconnect,
                "retry_for": retry_for,
            },
            {
                "tls_certificates": tls_certificates,
                "tls_psk_file": tls_psk_file,
                "tls_username": tls_username,
                "tls_verify_peer": tls_verify_peer,
                "uri_allow_local_file": uri_allow_local_file,
            },
        )
        self._clients = Clients(self._options)
        finalize(self, self._clients.close)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that runs the calls; in the child of a fork, another one."""
        if self._pid != os.getpid():
            self._loop = None if self.asynchronous else get_loop()
            self._pid = os.getpid()
        loop: asyncio.AbstractEventLoop | None = self._loop
        return loop

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """Return the whole URI: it is the path."""
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        path = os.fspath(path)
        return path if "://" in path else f"nbd://{path.lstrip('/')}"

    @classmethod
    def _parent(cls, path: str) -> str:
        return str(split(cls._strip_protocol(path)).server)

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        try:
            async with self._using(path) as kept:
                return described(path, kept.connecting.result())
        except FileNotFoundError:
            if not split(path).is_server:
                raise
        await self._listed(split(path), with_sizes=False)
        return {"name": path, "size": 0, "type": "directory"}

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        url = split(path)
        infos = [await self._info(path)] if url.name else await self._listed(url, detail)
        return infos if detail else sorted(info["name"] for info in infos)

    async def _listed(self, server: Url, with_sizes: bool) -> list[dict[str, Any]]:
        with naming(str(server)):
            exports = Exports(str(server), self._options, asyncio.get_running_loop())
            return await exports.infos(server, with_sizes)

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        async with self._using(self._strip_protocol(path)) as kept:
            size = kept.connecting.result().get_size()
            return await _read(kept, *slice(start, end).indices(size)[:2])

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: object = None,
        autocommit: bool = True,
        cache_type: object = None,
        cache_options: object = None,
        **kwargs: Any,
    ) -> BinaryIO:
        if sorted(mode.replace("t", "")) not in (["b", "r"], ["+", "b", "r"]):
            raise io.UnsupportedOperation(
                f"{path}: mode {mode!r} would replace the disk, which has a fixed size; use 'r+b'"
            )
        with naming(path):
            return self._options.file(path, mode)

    @asynccontextmanager
    async def _using(self, path: str) -> AsyncIterator[_Kept]:
        with naming(path):
            async with self._clients.use(path) as kept:
                yield kept


async def _read(kept: _Kept, start: int, stop: int) -> bytes:
    client = kept.connecting.result()

    async def piece(at: int) -> bytearray:
        async with kept.places:
            return await client.pread(min(_PIECE, stop - at), at)

    if stop - start <= _PIECE:
        return bytes(await piece(start)) if start < stop else b""
    return b"".join(await asyncio.gather(*map(piece, range(start, stop, _PIECE))))
