# SPDX-License-Identifier: LGPL-2.0-or-later
"""What nbd.copy reads from and writes to: disks, files, and streams.

A disk is one NBD export, over one handle or several.  The other two are in fileendpoint.py and
streamendpoint.py.
"""

from __future__ import annotations

import io
import os

from nbd._binding.methods import NBD
from nbd._disks.diskendpoint import Disk as Disk
from nbd._disks.diskendpoint import connected
from nbd._disks.fileendpoint import File as File
from nbd._disks.fileendpoint import identity, of_object, opened
from nbd._disks.queue import SOURCE
from nbd._disks.streamendpoint import Stream as Stream
from nbd._disks.streamendpoint import side_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Union

    from nbd._disks.copy import Settings

    Anything = Union[str, "os.PathLike[str]", bytes, Sequence[str], NBD, Any]
    End = Union["Disk", "File", "Stream"]

_SCHEMES = ("nbd", "nbds")  # perhaps followed by +unix, +vsock, +ssh
_MOST_CONNECTIONS = 4


def open_end(what: Anything, end: int, settings: Settings) -> End:
    """Open the source or target of a copy, as its caller has named it.

    Raises:
        nbd.Error, OSError: It cannot be connected or opened.
        nbd.Timeout: Nobody has opened the other side of a FIFO.
        TypeError: It is nothing that can be copied.
    """
    if isinstance(what, NBD):
        return Disk([what], is_ours=False)
    if is_server(what):
        return connected(what, settings.connections, settings.timeout, most_connections())
    if isinstance(what, (str, bytes, os.PathLike)):
        return opened(os.fspath(what), end, settings)
    if isinstance(what, io.TextIOBase):
        raise TypeError(
            f"{side_name(end)}: a text file cannot be copied; open it with mode 'rb' or 'wb'"
        )
    wanted = "read" if end == SOURCE else "write"
    if not hasattr(what, wanted):
        raise TypeError(
            f"{side_name(end)}: a URI, nbd.NBD, path or binary file is needed, "
            f"not {type(what).__name__}"
        )
    return of_object(what, end, settings)


def is_server(what: object) -> bool:
    """Whether it is a URI, or the command line of a server."""
    return isinstance(what, (list, tuple)) or (isinstance(what, str) and _is_uri(what))


def most_connections() -> int:
    """How many connections to make to a server that allows several, if nobody says."""
    return min(processors(), _MOST_CONNECTIONS)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # PyPy


def _is_uri(text: str) -> bool:
    scheme, colon, _ = text.partition(":")
    return colon != "" and scheme.lower().partition("+")[0] in _SCHEMES


def is_same(source: End, target: End) -> bool:
    """Whether both are one file, device or pipe: the copy would read what it has written."""
    if isinstance(source, Disk) or isinstance(target, Disk):
        return False
    what = identity(source)
    return what is not None and what == identity(target)
