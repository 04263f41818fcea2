# SPDX-License-Identifier: LGPL-2.0-or-later
"""The memory of what the shim makes lives as long as Python can name it."""

from __future__ import annotations

from nbd._binding.shim import IS_CPYTHON, ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

if IS_CPYTHON:
    from _weakref import ref  # weakref itself takes much longer to import

    # What the shim has made, and how it is freed, by a weak reference to the cdata that Python has
    # of it; and the weak references whose cdata is gone.  list.append is told that a cdata is gone,
    # and not a function: if a signal handler raised at a bytecode of such a function, the exception
    # would be lost.
    _named: dict[ref[Any], tuple[Callable[[Any], None], Any]] = {}
    _gone: list[ref[Any]] = []

    def owned(made: Any, destroy: Callable[[Any], None]) -> Any:
        """Have something freed when its cdata is gone: a later call of this function does it.

        Not by ffi.gc: CPython may finalize the cdata of a garbage cycle before other objects of the
        cycle that still use it.  A cdata without a finalizer lives until nothing refers to it.
        """
        # First: a signal handler may raise while others are freed.
        _named[ref(made, _gone.append)] = destroy, ffi.cast(ffi.typeof(made), made)
        while _gone:
            try:
                free, pointer = _named.pop(_gone.pop())
            except IndexError:  # another thread has freed the last one
                break
            free(pointer)
        return made

else:
    owned = ffi.gc


def is_owned(made: Any) -> bool:
    """Whether something will be freed by itself, as `owned` has been called for it.

    PyPy cannot tell.  There it is taken for granted: else it might be freed twice.
    """
    return not IS_CPYTHON or any(pointer == made for _, pointer in list(_named.values()))
