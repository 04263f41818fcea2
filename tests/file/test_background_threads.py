# SPDX-License-Identifier: LGPL-2.0-or-later
"""Background threads can be started, cancelled and joined in any order, at any moment."""

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

    thread = BackgroundThread(work, may_end.set)
    thread.start()
    assert begun.wait(BOUND)
    assert not thread.cancel()
    assert not thread.join(0.01)
    assert thread in running
    may_end.set()
    assert thread.join(BOUND)
    assert thread.join()  # again
    assert thread not in running


def test_one_that_was_cancelled_does_nothing_and_stays_cancelled() -> None:
    works: list[int] = []
    thread = BackgroundThread(lambda: works.append(1), nothing)
    assert thread.cancel()
    thread.start()
    assert thread.cancel()
    other = BackgroundThread(nothing, nothing)
    other.start()
    assert other.join(BOUND)
    assert works == []


def test_a_thread_whose_work_raises_can_be_joined() -> None:
    def fail() -> None:
        raise ValueError

    thread = BackgroundThread(fail, nothing)
    thread.start()
    assert thread.join(BOUND)


def test_starting_and_cancelling_at_once_is_one_or_the_other() -> None:
    for _ in range(200):
        works: list[int] = []
        thread = BackgroundThread(lambda works=works: works.append(1), nothing)  # type: ignore[misc]
        thread.start()
        if thread.cancel():
            assert thread.cancel()
        else:
            assert thread.join(BOUND)
            assert works == [1]
