# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec.NBDFileSystem."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from glob import has_magic
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple
from uuid import uuid4
from weakref import finalize

from fsspec.asyn import AsyncFileSystem, get_loop
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.spec import AbstractFileSystem
from fsspec.utils import isfilelike

from nbd.aio._client import Client
from nbd.aio._copy import copy
from nbd.fsspec._clients import DEPTH, Clients, Kept
from nbd.fsspec._exports import Exports, described
from nbd.fsspec._options import Options, naming, read_only
from nbd.fsspec._url import SCHEMES, Url, split

#: A read or write is cut into requests of at most this many bytes.
_PIECE = 1024 * 1024


class _Range(NamedTuple):
    """A range of a disk as fsspec describes it: a slice, and where its bytes belong."""

    place: int
    start: int | None
    end: int | None

    def of(self, size: int) -> tuple[int, int]:
        """Return the start and end for a disk of this size."""
        start, end, _ = slice(self.start, self.end).indices(size)
        return start, end


class NBDFileSystem(AsyncFileSystem):  # type: ignore[misc] # fsspec has no annotations
    """The exports of NBD servers as the files of fsspec.

    A path is the URI of an export, such as nbd://server/disk, so one instance serves any server.
    The URI of a server, without an export name, is its default export if it has one, and else a
    directory.  `ls` of it lists the exports in any case, and `glob` finds those whose names match.
    Through fsspec.open, which gives "::" another meaning, write IPv6 addresses in full:
    nbd://[0:0:0:0:0:0:0:1]/disk.

    A disk has a fixed size.  It can be opened with the modes "rb" and "r+b", whose file is that of
    nbd.open, with its read-ahead.  What would create, remove or resize a disk is a PermissionError.

    Connections are kept for later calls, and closed when they were not used for some seconds.
    Pickled instances contain the options only, and the child of a fork makes its own connections.

    Args:
        connections, timeout, reconnect, retry_for: As for nbd.open and nbd.aio.connect.
        tls_certificates, tls_psk_file, tls_username, tls_verify_peer, uri_allow_local_file: With
            what nbd.NBD.set_tls_certificates and so on are called before a handle connects.
        asynchronous, loop, batch_size: As for fsspec.asyn.AsyncFileSystem.
        use_listings_cache, listings_expiry_time, max_paths: Ignored: listings are not cached.

    Raises:
        OSError: A call failed.  Its errno says why, and its filename is the URL.
        TypeError, ValueError: An option has another name or value than those above.

    C: nbd_aio_pread, nbd_aio_pwrite, nbd_aio_opt_list, nbd_aio_opt_info.
    """

    protocol = SCHEMES
    _pid: int
    _loop: asyncio.AbstractEventLoop | None

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
        use_listings_cache: object = None,
        listings_expiry_time: object = None,
        max_paths: object = None,
        **unknown: Any,
    ) -> None:
        if self._cached:
            return
        _check_known(unknown)
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
        return self._loop

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
                return described(path, kept.connected)
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

    async def _walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: Any = "omit",
        **kwargs: Any,
    ) -> AsyncIterator[tuple[str, Any, Any]]:
        """Yield the exports of a server by their names: there are no further directories."""
        if maxdepth is not None and maxdepth < 1:
            raise ValueError("maxdepth must be at least 1")
        path = self._strip_protocol(path)
        try:
            infos = await self._ls(path)
        except OSError as error:
            if on_error == "raise":
                raise
            if callable(on_error):
                on_error(error)
            infos = []
        files = {split(info["name"]).name: info for info in infos}
        yield (path, {}, files) if kwargs.get("detail") else (path, [], list(files))

    def walk(self, path: str, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any, Any]]:
        """Yield the exports of a server by their names; older versions of fsspec need this."""

        async def walked() -> list[tuple[str, Any, Any]]:
            return [one async for one in self._walk(path, *args, **kwargs)]

        return iter(self._sync(walked))

    async def _glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        """Find the exports of a server whose name matches; the "?" of a URI is no pattern."""
        path = self._strip_protocol(path)
        url = split(path)
        found = {}
        if has_magic(url.name):
            infos = await self._ls(str(url.server))
            found = {info["name"]: info for info in infos if _matches(info["name"], url.name)}
        elif await self._exists(path):
            found = {path: await self._info(path)}
        return found if kwargs.get("detail") else sorted(found)

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        async with self._using(self._strip_protocol(path)) as kept:
            return await _read(kept, *_Range(0, start, end).of(kept.connected.get_size()))

    async def _cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        batch_size: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """Read ranges, with many requests in flight; so ranges need not be merged by max_gap."""
        if not isinstance(paths, list):
            raise TypeError(f"paths: a list is needed, not {type(paths).__name__}")
        first, last = _as_list(starts, len(paths)), _as_list(ends, len(paths))
        ranges: dict[str, list[_Range]] = {}
        for i, path in enumerate(paths):
            ranges.setdefault(self._strip_protocol(path), []).append(_Range(i, first[i], last[i]))
        results: list[Any] = [None] * len(paths)
        is_strict = on_error != "return"
        disks = [self._cat_disk(path, some, results, is_strict) for path, some in ranges.items()]
        await _together(disks)
        return results

    async def _cat_disk(
        self, path: str, ranges: list[_Range], results: list[Any], is_strict: bool
    ) -> None:
        """Read ranges of one disk, and put their bytes or exceptions into the results."""
        waiting = iter(ranges)

        async def work(kept: Kept) -> None:
            size = kept.connected.get_size()
            for one in waiting:
                try:
                    with naming(path):
                        results[one.place] = await _read(kept, *one.of(size))
                except Exception as error:
                    if is_strict:
                        raise
                    results[one.place] = error

        try:
            async with self._using(path) as kept:
                await _together([work(kept) for _ in range(min(DEPTH, len(ranges)))])
        except Exception as error:
            if is_strict:
                raise
            for one in ranges:
                results[one.place] = error

    async def _pipe_file(
        self,
        path: str,
        value: Any,
        mode: str = "overwrite",
        offset: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace the contents of a disk, or write at an offset, and flush.

        Args:
            value: Contiguous bytes-like object; without an offset, as large as the disk.
            offset: Where to write, in bytes from the start of the disk.
        """
        path = self._strip_protocol(path)
        with memoryview(value) as view, view.cast("B") as data:
            async with self._using(path) as kept:
                _check_can_write(path, kept.connected, mode)
                size = kept.connected.get_size()
                if offset is None:
                    _check_same_size(path, size, len(data))
                elif offset < 0:
                    raise ValueError(f"offset: {offset} is before the start of the disk")
                elif offset + len(data) > size:
                    text = f"{len(data)} bytes at offset {offset} do not fit: the disk has {size}"
                    raise OSError(errno.ENOSPC, text, path)
                await _write(kept, bytes(data), offset or 0)

    async def _get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Any = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Copy disks to local files; in a folder, they get the names of the exports."""
        if isinstance(rpath, list) and isinstance(lpath, list):
            return await super()._get(rpath, lpath, callback=callback, **kwargs)  # type: ignore[no-any-return]
        found = await self._expand_path(rpath, recursive=recursive, maxdepth=maxdepth)
        paths = [path for path in found if not await self._isdir(path)]
        targets = [os.fspath(lpath)]
        is_one = isinstance(rpath, str) and not recursive and not has_magic(split(rpath).name)
        if not is_one or targets[0].endswith("/") or os.path.isdir(targets[0]):
            targets = [os.path.join(targets[0], split(path).file_name) for path in paths]
        return await super()._get(paths, targets, callback=callback, **kwargs)  # type: ignore[no-any-return]

    async def _get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, **kwargs: Any
    ) -> None:
        """Copy a disk to a local file, which gets holes where the disk has zeroes."""
        rpath = self._strip_protocol(rpath)
        if (await self._info(rpath))["type"] == "directory":
            os.makedirs(lpath, exist_ok=True)
            return
        target = lpath if isfilelike(lpath) else Path(lpath)
        async with self._using(rpath) as kept:
            callback.set_size(kept.connected.get_size())
            await copy(kept.connected, target, progress=_progress(callback))

    async def _put_file(
        self,
        lpath: Any,
        rpath: str,
        mode: str = "overwrite",
        callback: Any = DEFAULT_CALLBACK,
        **kwargs: Any,
    ) -> None:
        """Copy a local file to a disk of the same size."""
        rpath = self._strip_protocol(rpath)
        async with self._using(rpath) as kept:
            _check_can_write(rpath, kept.connected, mode)
            size = os.stat(lpath).st_size
            _check_same_size(rpath, kept.connected.get_size(), size)
            callback.set_size(size)
            await copy(Path(lpath), kept.connected, progress=_progress(callback))

    async def _cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a disk to another one of the same size."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        async with self._using(path1) as source, self._using(path2) as target:
            _check_can_write(path2, target.connected, "overwrite")
            _check_same_size(path2, target.connected.get_size(), source.connected.get_size())
            await copy(source.connected, target.connected)

    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        raise _not_permitted("removed", path)

    async def _mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        raise _not_permitted("created", path)

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        if not exist_ok or not split(self._strip_protocol(path)).is_server:
            raise _not_permitted("created", path)

    def rmdir(self, path: str) -> None:
        """Refused: a client cannot remove a server."""
        raise _not_permitted("removed", path)

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        """Refused, unless the disk exists and need not be truncated."""
        if truncate or not self.exists(path):
            raise _not_permitted("truncated" if truncate else "created", path)

    def ukey(self, path: str) -> str:
        """Return a new string each time, as NBD does not report whether a disk was written to."""
        return uuid4().hex

    def checksum(self, path: str) -> int:
        """Return a new number each time, for the same reason."""
        return uuid4().int

    def invalidate_cache(self, path: str | None = None) -> None:
        """Close the connection to an export that is kept for later calls, or all.

        The size of a disk is that of the time when it was connected.
        """
        self._clients.drop(None if path is None else self._strip_protocol(path))
        super().invalidate_cache(path)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: object = None,
        autocommit: bool = True,
        cache_options: object = None,
        cache_type: object = None,
        **unknown: Any,
    ) -> BinaryIO:
        """Open a disk by nbd.open, which reads ahead; fsspec's caches are not used."""
        _check_known(unknown)
        if "x" in mode:
            raise FileExistsError(errno.EEXIST, "a disk cannot be created; use mode 'r+b'", path)
        if sorted(mode) not in (["b", "r"], ["+", "b", "r"]):
            raise io.UnsupportedOperation(
                f"{path}: mode {mode!r} would replace the disk, which has a fixed size; use 'r+b'"
            )
        self._clients.drop(path)  # the server may accept a single connection
        with naming(path):
            file = self._options.file(path, mode)
        file.size = file.seek(0, os.SEEK_END)  # type: ignore[attr-defined] # fsspec expects it
        file.seek(0)
        return file

    @asynccontextmanager
    async def _using(self, path: str) -> AsyncIterator[Kept]:
        with naming(path):
            async with self._clients.use(path) as kept:
                yield kept

    def _sync(
        self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kw: Any
    ) -> Any:
        """Run a coroutine in the event loop of fsspec, and wait for it.

        fsspec's own function would replace a TimeoutError by one without errno and message, and
        let the coroutine run on after Ctrl-C.
        """
        loop = self.loop
        if loop is None or loop.is_closed():
            raise RuntimeError("the file system is asynchronous: await its methods, such as _info")
        if asyncio._get_running_loop() is loop:
            raise NotImplementedError("a synchronous method is called in the event loop of fsspec")
        future = asyncio.run_coroutine_threadsafe(_outcome(function(*args, **kw)), loop)
        try:
            result, error = future.result()
        except BaseException:
            future.cancel()
            raise
        if error is None:
            return result
        try:
            raise error
        finally:
            del error, future  # the exception refers to this frame


async def _outcome(coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, Exception | None]:
    """Return a coroutine's result or exception: a future would copy some without their filename."""
    try:
        return await coroutine, None
    except Exception as error:
        return None, error


def _synchronous(name: str) -> Any:
    """Make the synchronous method of a coroutine."""

    def method(self: NBDFileSystem, *args: Any, **kwargs: Any) -> Any:
        return self._sync(getattr(self, f"_{name}"), *args, **kwargs)

    method.__name__ = name
    method.__doc__ = getattr(AbstractFileSystem, name).__doc__
    return method


for _name in dir(AsyncFileSystem):
    if iscoroutinefunction(getattr(NBDFileSystem, _name)) and hasattr(
        AbstractFileSystem, _name[1:]
    ):
        setattr(NBDFileSystem, _name[1:], _synchronous(_name[1:]))


def _check_known(unknown: dict[str, Any]) -> None:
    """Refuse options that do not exist."""
    if "target_protocol" in unknown:
        raise ValueError(
            "fsspec takes '::' in a URL as a chain of file systems; write an IPv6 address without "
            "it, such as [0:0:0:0:0:0:0:1]"
        )
    for name in unknown:
        raise TypeError(f"NBDFileSystem() got an unexpected option {name!r}")


def _matches(url: str, pattern: str) -> bool:
    parts = split(url)
    return fnmatchcase(parts.name, pattern) or fnmatchcase(parts.export_name, pattern)


def _as_list(numbers: Any, count: int) -> list[Any]:
    """Return one number for each path."""
    several = list(numbers) if isinstance(numbers, Iterable) else [numbers] * count
    if len(several) != count:
        raise ValueError(f"there are {count} paths, but {len(several)} starts or ends")
    return several


async def _together(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return the results of coroutines; if one fails or the caller is cancelled, end the others."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _read(kept: Kept, start: int, stop: int) -> bytes:
    """Read a range, in pieces that are in flight together."""

    async def piece(at: int) -> bytearray:
        async with kept.places:
            return await kept.connected.pread(min(_PIECE, stop - at), at)

    if stop - start <= _PIECE:
        return bytes(await piece(start)) if start < stop else b""
    return b"".join(await _together(map(piece, range(start, stop, _PIECE))))


async def _write(kept: Kept, data: bytes, offset: int) -> None:
    """Write data in pieces that are in flight together, and flush."""
    client = kept.connected

    async def piece(at: int) -> None:
        async with kept.places:
            await client.pwrite(data[at : at + _PIECE], offset + at)

    await _together(map(piece, range(0, len(data), _PIECE)))
    if client.can_flush():
        await client.flush()


def _check_can_write(path: str, client: Client, mode: str) -> None:
    if mode == "create":
        raise FileExistsError(errno.EEXIST, "the disk exists already", path)
    if client.is_read_only():
        raise read_only(path)


def _check_same_size(path: str, size: int, count: int) -> None:
    """Refuse to replace a disk by contents of another size."""
    if count != size:
        number = errno.ENOSPC if count > size else errno.EINVAL
        text = f"the disk has {size} bytes, and {count} cannot replace them"
        advice = "" if count > size else "; pipe_file(url, data, offset=0) writes a part"
        raise OSError(number, text + advice, path)


def _not_permitted(what: str, path: str) -> OSError:
    return PermissionError(errno.EPERM, f"an export cannot be {what} by a client", path)


def _progress(callback: Any) -> Callable[[int, int | None], None]:
    return lambda done, total: callback.absolute_update(done)
