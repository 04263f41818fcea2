"""settimeout and gettimeout, and the exception nbd.Timeout."""

from __future__ import annotations

import errno
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any, Callable

import pytest
from support.servers import StartServer
from support.waits import BLOCK, paused

import nbd


def test_a_new_handle_has_no_timeout(h: nbd.NBD) -> None:
    assert h.gettimeout() is None


@pytest.mark.parametrize(
    "seconds", [2.5, 1, 1 / 3, 1e-9, 1e300, math.inf, True, Fraction(1, 4), Decimal("0.1")]
)
def test_a_timeout_is_returned_as_it_was_set(h: nbd.NBD, seconds: Any) -> None:
    h.settimeout(seconds)
    assert h.gettimeout() == float(seconds)
    assert type(h.gettimeout()) is float


def test_none_ends_a_timeout(h: nbd.NBD) -> None:
    h.settimeout(1)
    h.settimeout(None)
    assert h.gettimeout() is None


@pytest.mark.parametrize("seconds", [0, 0.0, -0.0, -1, -math.inf, math.nan, False])
def test_a_number_that_is_not_more_than_0_is_a_value_error(h: nbd.NBD, seconds: float) -> None:
    h.settimeout(7)
    with pytest.raises(ValueError, match=r"^seconds: .*None means no timeout$"):
        h.settimeout(seconds)
    assert h.gettimeout() == 7


@pytest.mark.parametrize("seconds", ["1", b"1", [1], object()])
def test_a_timeout_that_is_not_a_number_is_a_type_error(h: nbd.NBD, seconds: Any) -> None:
    with pytest.raises(TypeError, match=r"^seconds: "):
        h.settimeout(seconds)


def test_an_integer_too_large_for_a_float_is_an_overflow_error(h: nbd.NBD) -> None:
    with pytest.raises(OverflowError):
        h.settimeout(10**400)


def test_each_handle_has_its_own(h: nbd.NBD) -> None:
    h.settimeout(1)
    with nbd.NBD() as other:
        assert other.gettimeout() is None


@pytest.mark.parametrize("call", [lambda h: h.settimeout(1), lambda h: h.gettimeout()])
def test_a_closed_handle_has_no_timeout(h: nbd.NBD, call: Callable[[nbd.NBD], object]) -> None:
    h.close()
    with pytest.raises(nbd.ClosedHandle):
        call(h)


@pytest.mark.parametrize("seconds", [20.0, 1e300, math.inf])
def test_a_timeout_that_is_not_over_changes_nothing(
    nbdkit: StartServer, h: nbd.NBD, seconds: float
) -> None:
    h.settimeout(seconds)
    h.connect_unix(nbdkit("memory", "1M").socket)
    h.pwrite(b"abcd", 0)
    assert h.pread(4, 0) == b"abcd"
    h.shutdown()


def test_the_time_of_poll_may_be_over_first(disk: nbd.NBD) -> None:
    disk.settimeout(20)
    assert disk.poll(10) == 0
    assert disk.poll(0) == 0


def test_a_look_at_the_connection_does_not_wait(disk: nbd.NBD) -> None:
    disk.settimeout(1e-9)
    assert disk.poll(0) == 0


def test_a_server_that_sends_little_by_little_is_stopped_too(
    nbdkit: StartServer, h: nbd.NBD
) -> None:
    h.connect_unix(nbdkit("memory", "16M", "--filter=rate", "rate=8M").socket)
    h.settimeout(0.1)
    with pytest.raises(nbd.Timeout):
        h.pread(1 << 22, 0)


@pytest.fixture
def timeout(nbdkit: StartServer, h: nbd.NBD) -> nbd.Timeout:
    """Return an nbd.Timeout that a call raised."""
    server = nbdkit("memory", "1M")
    h.connect_unix(server.socket)
    h.settimeout(0.01)
    with paused(server), pytest.raises(nbd.Timeout) as caught:
        h.pread(BLOCK, 0)
    return caught.value


def test_it_is_an_error_of_both_kinds(timeout: nbd.Timeout) -> None:
    assert isinstance(timeout, nbd.Error)
    assert isinstance(timeout, TimeoutError)
    assert type(timeout).__module__ == "nbd"


def test_it_has_the_attributes_of_an_error(timeout: nbd.Timeout) -> None:
    assert (timeout.errnum, timeout.errno) == (errno.ETIMEDOUT, "ETIMEDOUT")
    assert timeout.args == (timeout.string, errno.ETIMEDOUT)
    assert str(timeout) == f"{timeout.string} (ETIMEDOUT)"
    assert timeout.strerror == "Connection timed out"


def test_it_says_which_call_how_long_and_what_to_do(timeout: nbd.Timeout) -> None:
    assert timeout.string.startswith("nbd_pread: ")
    assert "0.01 seconds" in timeout.string
    assert "settimeout" in timeout.string


def test_it_can_be_pickled(timeout: nbd.Timeout) -> None:
    copy = pickle.loads(pickle.dumps(timeout))
    assert type(copy) is nbd.Timeout
    assert copy.args == timeout.args


def test_a_star_import_does_not_bring_it() -> None:
    assert "Timeout" not in nbd.__all__
