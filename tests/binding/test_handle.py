"""The life of a handle: how it begins, the ways in which it ends, and a closed handle."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any, Callable

import pytest
from support import usage
from support.handles import closed, poll
from support.methods import METHODS, call_with_anything
from support.programs import run_program
from support.servers import StartServer

import nbd


def test_a_new_handle_is_created_and_not_connected(h: nbd.NBD) -> None:
    assert h.aio_is_created()
    assert not h.aio_is_ready()


def test_two_handles_are_two(h: nbd.NBD) -> None:
    with nbd.NBD() as other:
        h.set_handle_name("one")
        other.set_handle_name("two")
        assert (h.get_handle_name(), other.get_handle_name()) == ("one", "two")


def test_a_handle_takes_attributes(h: Any) -> None:
    h.note = "mine"
    assert h.note == "mine"


def test_a_subclass_works(nbdkit: StartServer) -> None:
    class Disk(nbd.NBD):
        def __init__(self, socket: str) -> None:
            super().__init__()
            self.connect_unix(socket)

    with Disk(nbdkit("memory", "1M").socket) as disk:
        assert disk.get_size() == 1 << 20


def test_a_subclass_that_does_not_call_init_has_no_handle() -> None:
    class Disk(nbd.NBD):
        def __init__(self) -> None:
            pass

    disk = Disk()
    for call in (disk.get_size, disk.close):
        with pytest.raises(AttributeError):
            call()


class Unmade(nbd.NBD):
    """A handle whose __init__ does not call NBD.__init__."""

    def __init__(self) -> None:
        """Leave out super().__init__()."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_a_handle_whose_init_was_not_called_says_so(name: str) -> None:
    for handle in (Unmade(), nbd.NBD.__new__(nbd.NBD)):
        with pytest.raises(AttributeError, match="__init__"):
            call_with_anything(handle, name)


def test_a_handle_whose_init_was_not_called_goes_in_silence(unraisable: list[Any]) -> None:
    for unmade in (Unmade, nbd.NBD):
        handle = unmade.__new__(unmade)
        assert unmade.__name__ in repr(handle)
        assert not hasattr(handle, "no_such_attribute")
        del handle
    usage.collect_garbage()
    assert unraisable == []


def test_a_second_init_leaves_no_connection_behind(nbdkit: StartServer) -> None:
    h = nbd.NBD()
    h.connect_unix(nbdkit("memory", "1M").socket)
    before = usage.descriptors()
    h.aio_pread(bytearray(512), 0)
    h.__init__()  # type: ignore[misc]
    h.close()
    usage.collect_garbage()
    assert usage.descriptors() < before
    assert usage.registered() == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_a_closed_handle_raises_closed_handle(name: str) -> None:
    handle = nbd.NBD()
    handle.close()
    with pytest.raises(nbd.ClosedHandle):
        call_with_anything(handle, name)


def test_a_second_close_raises_closed_handle() -> None:
    handle = nbd.NBD()
    handle.close()
    with pytest.raises(nbd.ClosedHandle):
        handle.close()


def test_close_ends_the_connection(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M", "--filter=exitlast")
    handle = nbd.NBD()
    handle.connect_unix(server.socket)
    handle.close()
    assert server.wait() == 0


def test_close_with_a_command_in_flight(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M", "--filter=delay", "rdelay=60")
    handle = nbd.NBD()
    handle.connect_unix(server.socket)
    handle.aio_pread(bytearray(512), 0, lambda error: 1)
    handle.close()
    assert closed(handle)


def test_close_during_the_handshake(nbdkit: StartServer) -> None:
    handle = nbd.NBD()
    handle.aio_connect_unix(nbdkit("memory", "1M").socket)
    poll(handle)
    handle.close()
    assert closed(handle)


def test_nbd_nbd_gives_a_handle_and_closes_it() -> None:
    with nbd.nbd() as handle:
        assert isinstance(handle, nbd.NBD)
        assert not closed(handle)
    assert closed(handle)


def test_nbd_nbd_closes_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), nbd.nbd() as handle:
        raise ZeroDivisionError
    assert closed(handle)


def test_with_a_handle_gives_that_handle_and_closes_it() -> None:
    handle = nbd.NBD()
    with handle as same:
        assert same is handle
        assert not closed(handle)
    assert closed(handle)


def test_with_a_handle_closes_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), nbd.NBD() as handle:
        raise ZeroDivisionError
    assert closed(handle)


def test_with_a_handle_closes_after_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), nbd.NBD() as handle:
        raise KeyboardInterrupt
    assert closed(handle)


def test_a_dropped_handle_closes_the_connection(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M", "--filter=exitlast")
    handle = nbd.NBD()
    handle.connect_unix(server.socket)
    del handle
    gc.collect()
    assert server.wait() == 0


def test_a_dropped_handle_in_a_cycle_closes_the_connection(nbdkit: StartServer) -> None:
    server = nbdkit("memory", "1M", "--filter=exitlast")
    handle: Any = nbd.NBD()
    handle.itself = handle
    handle.connect_unix(server.socket)
    del handle
    gc.collect()
    assert server.wait() == 0


def test_a_dropped_handle_is_collected() -> None:
    handle = nbd.NBD()
    reference = weakref.ref(handle)
    del handle
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_cannot_be_duplicated(h: nbd.NBD, duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        duplicate(h)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_handle_cannot_be_pickled(h: nbd.NBD, protocol: int) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(h, protocol)


def test_a_subclass_whose_init_raises_first_leaves_no_trace(unraisable: list[Any]) -> None:
    class Broken(nbd.NBD):
        def __init__(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken()
    gc.collect()
    assert unraisable == []


def test_a_subclass_whose_init_raises_last_leaves_no_trace(unraisable: list[Any]) -> None:
    class Broken(nbd.NBD):
        def __init__(self) -> None:
            super().__init__()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken()
    gc.collect()
    assert unraisable == []


def test_the_module_has_the_version_of_libnbd(h: nbd.NBD) -> None:
    assert nbd.__version__ == h.get_version()


def test_the_module_has_the_name_of_the_package(h: nbd.NBD) -> None:
    assert nbd.package_name == h.get_package_name() == "libnbd"


def test_the_import_leaves_the_way_that_others_are_linked() -> None:
    program = """
import sys
before = sys.getdlopenflags()
import nbd
assert sys.getdlopenflags() == before
"""
    done = run_program(program)
    assert done.returncode == 0, done.stderr
