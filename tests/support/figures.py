"""Figures: numbers that tests record in pytest's XML report and `./run soak` tabulates.

A test records a figure with the fixture `figure`. A program that a test starts prints one figure
per line, and the test passes them on.
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
