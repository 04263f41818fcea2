# SPDX-License-Identifier: LGPL-2.0-or-later
"""The open files: they are closed when the program ends, and left alone in the child of a fork.

The handles are closed when the program ends, and only then would io flush what a program has left
open.  So that is done here, before: atexit runs first what was registered last.
"""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack
from weakref import WeakSet

from nbd._disks.rawfile import DiskFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_raws: WeakSet[DiskFile] = WeakSet()
_buffers: WeakSet[Any] = WeakSet()


def look_after(raw: DiskFile, file: Any) -> None:
    """Look after a file: the unbuffered one, and what the program has, which may be the same."""
    _raws.add(raw)
    if file is not raw:
        _buffers.add(file)


def _mark_inherited() -> None:
    """In the child of a fork: the connections are the parent's."""
    for raw in list(_raws):
        raw.become_inherited()


os.register_at_fork(after_in_child=_mark_inherited)


@atexit.register
def _close_all() -> None:
    with ExitStack() as stack:  # it runs all of them, and raises the last error
        for raw in list(_raws):
            stack.callback(_close, raw)
        for file in list(_buffers):
            stack.callback(_close, file)


def _close(file: Any) -> None:
    """Close a file that the program has left open, unless another thread uses it."""
    try:
        raw = file if isinstance(file, DiskFile) else file.raw
    except ValueError:  # the buffer has been detached
        return
    if not raw.closed and not raw.is_inherited and raw.is_idle():
        try:
            raw._dealloc_warn(file)
        finally:
            file.close()
