"""Each kind of callback with annotations: mypy checks them in `./run lint`, and the tests run them.

A `type: ignore` marks what mypy must reject: mypy also reports one that is not needed.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import pytest
from support.handles import drain, finish, run_until
from support.servers import StartServer
from support.sizes import MIB

import nbd
from nbd.types import (
    Address,
    ChunkCallback,
    CompletionCallback,
    ContextCallback,
    DebugCallback,
    ErrorNumber,
    Extent64Callback,
    ExtentCallback,
    ListCallback,
)


class BlockStatus64(Protocol):
    """The type of block_status_64, in versions of libnbd that have it."""

    def __call__(self, count: int, offset: int, extent64: Extent64Callback) -> None:
        """Ask for extents."""


class Seen:
    """Callbacks of each kind, which record the types of their arguments."""

    def __init__(self) -> None:
        self.types: list[type] = []

    def note(self, *arguments: object) -> None:
        """Record the types of a callback's arguments."""
        self.types = [type(argument) for argument in arguments]

    def chunk(self, subbuf: memoryview, offset: int, status: int, error: ErrorNumber) -> None:
        """Receive a part of a structured read."""
        self.note(subbuf, offset, status, error.value)

    def completion(self, error: ErrorNumber) -> bool:
        """Receive the end of a command."""
        self.note(error.value)
        return not error

    def context(self, name: str) -> None:
        """Receive a meta context."""
        self.note(name)

    def debug(self, function: str, message: str) -> int:
        """Receive a debug message."""
        self.note(function, message)
        return 0

    def extent(self, metacontext: str, offset: int, entries: list[int], error: ErrorNumber) -> int:
        """Receive extents as a flat list."""
        self.note(metacontext, offset, entries, error.value, *entries)
        return 0

    def extent64(
        self, metacontext: str, offset: int, entries: list[tuple[int, int]], error: ErrorNumber
    ) -> int:
        """Receive extents as a list of pairs."""
        self.note(metacontext, offset, entries, error.value, *entries[0])
        return 0

    def export(self, name: str, description: str) -> None:
        """Receive an export."""
        self.note(name, description)


@pytest.fixture
def seen() -> Seen:
    """Return callbacks that have not been called."""
    return Seen()


def test_a_chunk_callback_is_called_as_it_is_annotated(disk: nbd.NBD, seen: Seen) -> None:
    callback: ChunkCallback = seen.chunk
    disk.pread_structured(512, 0, callback)
    assert seen.types == [memoryview, int, int, int]


def test_a_completion_callback_is_called_as_it_is_annotated(disk: nbd.NBD, seen: Seen) -> None:
    callback: CompletionCallback = seen.completion
    disk.aio_pread(bytearray(512), 0, callback)
    drain(disk)
    assert seen.types == [int]


def test_a_context_callback_is_called_as_it_is_annotated(opt: nbd.NBD, seen: Seen) -> None:
    callback: ContextCallback = seen.context
    opt.opt_list_meta_context(callback)
    assert seen.types == [str]


def test_a_debug_callback_is_called_as_it_is_annotated(h: nbd.NBD, seen: Seen) -> None:
    callback: DebugCallback = seen.debug
    h.set_debug_callback(callback)
    h.set_debug(True)
    h.get_handle_name()
    assert seen.types == [str, str]


def test_an_extent_callback_is_called_as_it_is_annotated(disk: nbd.NBD, seen: Seen) -> None:
    callback: ExtentCallback = seen.extent
    disk.block_status(MIB, 0, callback)
    assert seen.types == [str, int, list, int, int, int]


@pytest.mark.skipif(
    not hasattr(nbd.NBD, "block_status_64"), reason="a later version of libnbd has it"
)
def test_an_extent64_callback_is_called_as_it_is_annotated(disk: nbd.NBD, seen: Seen) -> None:
    callback: Extent64Callback = seen.extent64
    cast(BlockStatus64, cast(Any, disk).block_status_64)(MIB, 0, callback)
    assert seen.types == [str, int, list, int, int, int]


def test_a_list_callback_is_called_as_it_is_annotated(opt: nbd.NBD, seen: Seen) -> None:
    callback: ListCallback = seen.export
    opt.opt_list(callback)
    assert seen.types == [str, str]


def test_an_address_is_taken_as_it_is_annotated(nbdkit: StartServer, h: nbd.NBD) -> None:
    address: Address = nbdkit("memory", "1M").socket
    h.aio_connect(address)
    run_until(h, h.aio_is_ready)


def test_a_function_of_other_arguments_is_found_wrong_by_mypy(
    disk: nbd.NBD, unraisable: list[Any]
) -> None:
    def forgetful() -> int:
        return 0

    finish(disk, disk.aio_flush(forgetful))  # type: ignore[arg-type]
    assert [type(exception) for exception in unraisable] == [TypeError]


def test_a_callback_that_is_none_is_found_wrong_by_mypy_where_one_is_needed(disk: nbd.NBD) -> None:
    with pytest.raises(TypeError, match="chunk: a callable is needed, not NoneType"):
        disk.pread_structured(512, 0, None)  # type: ignore[arg-type]


def test_a_str_for_a_buffer_is_found_wrong_by_mypy(disk: nbd.NBD) -> None:
    with pytest.raises(TypeError, match="buf: a bytes-like object"):
        disk.pwrite("text", 0)  # type: ignore[arg-type]
