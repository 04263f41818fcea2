# SPDX-License-Identifier: LGPL-2.0-or-later
"""Threads that can be started, cancelled and joined in any order, at any moment."""

from __future__ import annotations

import threading

from nbd._disks.background import BackgroundThread, running

BOUND = 10  # seconds until a test fails because an event does not happen


def nothing() -> None:
    """Do nothing."""


def test_one_that_works_cannot_be_cancelled() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(BOUND)

    helper = BackgroundThread(work, may_end.set)
    helper.start()
    assert begun.wait(BOUND)
    assert not helper.cancel()
    assert not helper.join(0.01)
    assert helper in running
    may_end.set()
    assert helper.join(BOUND)
    assert helper.join()  # again
    assert helper not in running


def test_one_that_was_cancelled_does_nothing_and_stays_cancelled() -> None:
    works: list[int] = []
    helper = BackgroundThread(lambda: works.append(1), nothing)
    assert helper.cancel()
    helper.start()
    assert helper.cancel()
    other = BackgroundThread(nothing, nothing)
    other.start()
    assert other.join(BOUND)
    assert works == []


def test_a_helper_whose_work_raises_can_be_joined() -> None:
    def fail() -> None:
        raise ValueError

    helper = BackgroundThread(fail, nothing)
    helper.start()
    assert helper.join(BOUND)


def test_starting_and_cancelling_at_once_is_one_or_the_other() -> None:
    for _ in range(200):
        works: list[int] = []
        helper = BackgroundThread(lambda works=works: works.append(1), nothing)  # type: ignore[misc]
        helper.start()
        if helper.cancel():
            assert helper.cancel()
        else:
            assert helper.join(BOUND)
            assert works == [1]
