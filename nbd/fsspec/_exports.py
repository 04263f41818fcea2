# SPDX-License-Identifier: LGPL-2.0-or-later
"""List the exports of a server, in an event loop."""

from __future__ import annotations

import errno
import os
from asyncio import AbstractEventLoop
from contextlib import suppress
from typing import Any

from nbd._binding.constants import SIZE_MAXIMUM, SIZE_MINIMUM, SIZE_PREFERRED
from nbd._binding.errors import Error
from nbd._binding.methods import NBD
from nbd._disks.connect import prepared
from nbd.aio._client import Client
from nbd.aio._connect import Plan, _Attempt, close_soon
from nbd.fsspec._options import Options
from nbd.fsspec._url import Url

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nbd._disks.connect import Uri

_SIZES = {
    "block_size_minimum": SIZE_MINIMUM,
    "block_size_preferred": SIZE_PREFERRED,
    "block_size_maximum": SIZE_MAXIMUM,
}


def described(name: str, disk: NBD | Client) -> dict[str, Any]:
    """Return what fsspec calls the info of a file.

    Args:
        name: The URL of the export.
        disk: It has the properties of the export.
    """
    sizes = {key: disk.get_block_size(which) for key, which in _SIZES.items()}
    return {
        "name": name,
        "size": disk.get_size(),
        "type": "file",
        "read_only": disk.is_read_only(),
        **{key: size for key, size in sizes.items() if size},
    }


class Exports(_Attempt):
    """One connection that lists the exports of a server, and does not use any of them."""

    def __init__(self, url: str, options: Options, loop: AbstractEventLoop) -> None:
        retry_for = options.retry_for or 0.0
        plan = Plan(url, [], options.prepare, options.timeout, retry_for)
        super().__init__(plan, loop)

    def _new_handle(self) -> tuple[NBD, Uri]:
        handle, uri = prepared(self._plan.uri, [], self._plan.prepare)
        handle.set_opt_mode(True)
        return handle, uri

    async def infos(self, server: Url, with_sizes: bool) -> list[dict[str, Any]]:
        """Return the infos of the exports, in the order of the server.

        Raises:
            nbd.Error: The server cannot be reached, or does not list its exports.
        """
        handle = await self.run()
        try:
            if not handle.aio_is_negotiating():  # the old protocol, which has one export
                return [described(str(server), handle)]
            names: list[str] = []
            await self._ask(handle, "opt_list", lambda name, _: names.append(name))
            return [await self._info(handle, server, name, with_sizes) for name in names]
        finally:
            close_soon([handle], self._plan)

    async def _info(
        self, handle: NBD, server: Url, name: str, with_sizes: bool
    ) -> dict[str, Any]:
        url = str(server.export(name))
        if with_sizes:
            handle.set_export_name(name)
            with suppress(Error):  # some servers do not answer that, or the export is in use
                await self._ask(handle, "opt_info")
                return described(url, handle)
        return {"name": url, "size": None, "type": "file"}

    async def _ask(self, handle: NBD, option: str, *arguments: Any) -> None:
        """Send an option, and wait for the reply."""
        failed: list[int] = []
        begin = getattr(handle, f"aio_{option}")
        begin(*arguments, lambda error: failed.append(error.value))
        await self._finish(handle, f"aio_{option}")
        if failed != [0]:
            errnum = failed[0] if failed else errno.ECONNRESET
            raise Error(f"nbd_{option}: {os.strerror(errnum)}", errnum)
