# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec.NBDFileSystem: the exports of NBD servers for fsspec.

    >>> import fsspec
    >>> with fsspec.open("nbd://server/disk", timeout=30) as disk:
    ...     disk.read(512)

pandas, pyarrow, Dask, xarray and other programs that open URLs by fsspec find this file system by
the entry points of the package: they need no import, only `pip install libnbd-cffi[fsspec]`.

A path is the whole URI of an export, as nbd.open takes it, so one instance serves any server.
"""

from __future__ import annotations

try:
    import fsspec as _fsspec  # noqa: F401 - to raise a better exception if it is missing
except ModuleNotFoundError as _missing:
    if _missing.name != "fsspec":
        raise
    raise ImportError(
        "nbd.fsspec needs the package fsspec: pip install fsspec, or libnbd-cffi[fsspec]"
    ) from None

from nbd.fsspec._filesystem import NBDFileSystem

__all__ = ["NBDFileSystem"]
