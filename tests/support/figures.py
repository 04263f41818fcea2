"""Figures: what a test counted. They go into pytest's XML report, and `./run soak` tabulates them.

A test records them with the fixture `figure`. A program that a test starts prints them, a line for
each, and the test passes them on.
"""

from __future__ import annotations

from collections.abc import Callable

Figure = Callable[[str, object], None]


def show(name: str, value: object) -> None:
    """Print a figure."""
    print(f"{name}: {value}", flush=True)


def pass_on(printed: str, figure: Figure) -> None:
    """Record the figures that a program printed."""
    for line in printed.splitlines():
        name, _, value = line.rpartition(": ")
        figure(name, value)
