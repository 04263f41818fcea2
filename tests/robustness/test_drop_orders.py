"""The handle, buffer and callable of a command, dropped in every order and at every time."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from itertools import permutations
from typing import Any, Callable

import pytest
from support.handles import drain
from support.servers import StartServer
from support.usage import Bytes, collect_garbage

import nbd

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")

ORDERS = list(permutations(["handle", "buffer", "callable"]))

Drop = Callable[[], None]


class Callback:
    """A callable that supports weak references, and that acts when it is called."""

    def __init__(self, result: int, act: Drop | None = None) -> None:
        """Return this result, after the act if there is one."""
        self.result = result
        self.act = act

    def __call__(self, *arguments: Any) -> int:
        """Act the first time, and return the result."""
        act, self.act = self.act, None
        if act is not None:
            act()
        return self.result


class Command:
    """A read with its handle, buffer and callable, and weak references to these."""

    def __init__(self, path: str, result: int = 1, act: Drop | None = None) -> None:
        """Connect and issue the read, whose callbacks act and return the result."""
        self.held: dict[str, Any] = {
            "handle": nbd.NBD(),
            "buffer": Bytes(512),
            "callable": Callback(result, act),
        }
        self.left = {name: weakref.ref(one) for name, one in self.held.items()}
        self.held["handle"].connect_unix(path)
        self.issue()

    def issue(self) -> None:
        """Issue the read."""
        self.held["handle"].aio_pread_structured(
            self.held["buffer"], 0, lambda *chunk: 0, completion=self.held["callable"]
        )

    def drop(self, order: tuple[str, ...]) -> None:
        """Drop the objects in this order; libnbd keeps the ones that it needs."""
        for name in order:
            del self.held[name]
            gc.collect()

    def is_gone(self) -> bool:
        """Return whether all of them were freed."""
        collect_garbage()
        return not self.held and not [one for one in self.left.values() if one() is not None]


@pytest.fixture
def stuck(nbdkit: StartServer) -> str:
    """Return the socket of a server that never answers a read."""
    return nbdkit("memory", "1M", "--filter=delay", "rdelay=600").socket


@pytest.fixture
def prompt(nbdkit: StartServer) -> str:
    """Return the socket of a server that answers."""
    return nbdkit("memory", "1M").socket


def test_with_the_command_in_flight(stuck: str) -> None:
    for order in ORDERS:
        command = Command(stuck)
        command.drop(order)
        assert command.is_gone(), order


def test_what_is_in_flight_lives_as_long_as_the_handle(stuck: str) -> None:
    for order in ORDERS:
        command = Command(stuck)
        before = order[: order.index("handle")]
        command.drop(before)
        assert all(command.left[name]() is not None for name in before), order
        command.drop(order[len(before) :])


@pytest.mark.parametrize("result", [0, 1], ids=["not retired", "retired"])
def test_with_the_command_completed(prompt: str, result: int) -> None:
    for order in ORDERS:
        command = Command(prompt, result)
        drain(command.held["handle"])
        command.drop(order)
        assert command.is_gone(), order


@pytest.mark.parametrize("result", [0, 1, -1], ids=["not retired", "retired", "failed"])
def test_in_the_command_s_own_callback(prompt: str, result: int) -> None:
    commands: list[Command] = []
    for order in ORDERS:
        commands[:] = [Command(prompt, result, lambda: commands[0].drop(order))]  # noqa: B023
        while commands[0].held:  # until the call holds the only reference to the handle
            commands[0].held["handle"].poll(-1)
        assert commands[0].is_gone(), order


def test_in_a_callback_of_another_handle(stuck: str, disk: nbd.NBD) -> None:
    for order in ORDERS:
        command = Command(stuck)
        drop = partial(command.drop, order)
        disk.pread_structured(512, 0, Callback(0, drop))
        assert command.is_gone(), order
    assert disk.pread(4, 0) == bytes(4)


def test_while_the_same_objects_are_in_flight_twice(stuck: str) -> None:
    for order in ORDERS:
        command = Command(stuck)
        command.issue()
        command.drop(order)
        assert command.is_gone(), order


def test_in_a_cycle_of_all_three(stuck: str) -> None:
    for order in ORDERS:
        command = Command(stuck)
        command.held["handle"].others = command.held["buffer"], command.held["callable"]
        command.held["buffer"].other = command.held["callable"]
        command.drop(order)
        assert command.is_gone(), order


def test_after_close(stuck: str) -> None:
    for order in ORDERS:
        command = Command(stuck)
        command.held["handle"].close()
        command.drop(order)
        assert command.is_gone(), order
