"""Memory that no Python object owns."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

_WRITABLE = 0x200  # PyBUF_WRITE


def unowned_view(memory: ctypes.Array[Any]) -> memoryview:
    """Return a memoryview without an owner, as CPython's io makes them; skip on PyPy."""
    if sys.implementation.name != "cpython":
        pytest.skip("only CPython can make a view without an owner, as its io does")
    make = ctypes.pythonapi.PyMemoryView_FromMemory
    make.restype, make.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int],
    )
    view: memoryview = make(ctypes.addressof(memory), len(memory), _WRITABLE)
    assert view.obj is None
    return view
