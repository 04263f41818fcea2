# SPDX-License-Identifier: LGPL-2.0-or-later
"""Free the shim's objects once Python holds no reference to them."""

from __future__ import annotations

from nbd._binding.shim import IS_CPYTHON, ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

if IS_CPYTHON:
    from _weakref import ref  # weakref itself takes much longer to import

    # _named has each object of the shim and the function that frees it, by a weak reference to the
    # cdata of the object.  _gone has the weak references whose cdata is gone.  Their callback is
    # list.append and not a function of our own: if a signal handler raised at a bytecode of that
    # function, the exception would be lost.
    _named: dict[ref[Any], tuple[Callable[[Any], None], Any]] = {}
    _gone: list[ref[Any]] = []

    def owned(made: Any, destroy: Callable[[Any], None]) -> Any:
        """Free an object of the shim after its cdata is gone, in a later call of this function.

        ffi.gc would not do: CPython may finalize the cdata of a garbage cycle before other objects
        of the cycle that still use it.  A cdata without a finalizer lives until nothing refers to
        it.
        """
        # This comes first because a signal handler may raise while others are freed.
        _named[ref(made, _gone.append)] = destroy, ffi.cast(ffi.typeof(made), made)
        while _gone:
            try:
                free, pointer = _named.pop(_gone.pop())
            except IndexError:  # another thread has taken the last one
                break
            free(pointer)
        return made

else:
    owned = ffi.gc


def is_owned(made: Any) -> bool:
    """Whether `owned` was called for an object of the shim, so that it will be freed.

    PyPy cannot tell, and always returns True: otherwise the object might be freed twice.
    """
    return not IS_CPYTHON or any(pointer == made for _, pointer in list(_named.values()))
