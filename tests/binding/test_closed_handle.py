"""Every method of a closed handle raises nbd.ClosedHandle, whatever its arguments are."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from support.methods import ARGUMENTS, METHODS
from support.usage import registered

import nbd


class Failing:
    """A number, a path and a list whose conversions raise."""

    def __index__(self) -> int:
        raise RuntimeError("no number")

    def __fspath__(self) -> str:
        raise RuntimeError("no path")

    def __iter__(self) -> Any:
        raise RuntimeError("no list")

    def __len__(self) -> int:
        raise RuntimeError("no length")


WRONG = {
    "object": object(),
    "too large": 2**70,
    "too small": -(2**70),
    "NUL": "\0",
    "None": None,
    "list of objects": [object()],
    "tuple": ("host.invalid", 1),
    "not contiguous": memoryview(bytearray(8))[::2],
    "read-only": bytes(8),
    "callable": print,
    "failing": Failing(),
}


def parameters(name: str) -> list[str]:
    """Return the parameters of a method."""
    return list(inspect.signature(getattr(nbd.NBD, name)).parameters)[1:]


@pytest.fixture
def closed_handle() -> nbd.NBD:
    """Return a closed handle."""
    handle = nbd.NBD()
    handle.close()
    return handle


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", [name for name in METHODS if parameters(name)])
def test_a_closed_handle_says_so_whatever_the_arguments_are(
    closed_handle: nbd.NBD, name: str, wrong: object
) -> None:
    method = getattr(closed_handle, name)
    with pytest.raises(nbd.ClosedHandle):
        method(*[wrong] * len(parameters(name)))
    assert registered() == 0


@pytest.mark.parametrize("name", [name for name in METHODS if len(parameters(name)) > 1])
def test_a_closed_handle_says_so_if_one_argument_is_wrong(
    closed_handle: nbd.NBD, name: str
) -> None:
    method = getattr(closed_handle, name)
    acceptable = {parameter: ARGUMENTS.get(parameter, 0) for parameter in parameters(name)}
    for parameter in acceptable:
        for wrong in WRONG.values():
            with pytest.raises(nbd.ClosedHandle):
                method(**{**acceptable, parameter: wrong})
    assert registered() == 0
