# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run soak: the test suite in its long form, and a table of what the tests counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from check import WHOLE, check_here, closing_line
from console import LOGS, run, say
from suite import Outcome

BETWEEN = 60  # seconds from one line about how far the tests are to the next
LONG_FORM = "-v", "-o", "faulthandler_timeout=1800"  # for pytest: a long test takes half an hour


def table(outcomes: list[Outcome]) -> list[str]:
    """A line for each figure, with a column for each run, and how long each took."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.figures))
    rows = [("", *(f"{o.interpreter} {o.mode}" for o in outcomes))]
    rows += [(name, *(o.figures.get(name, "-") for o in outcomes)) for name in names]
    rows += [("minutes", *(f"{o.seconds / 60:.1f}" for o in outcomes))]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def last_lines() -> dict[str, str]:
    """What each run has printed last: the test that it is at."""
    texts = {log.stem: log.read_text(errors="replace") for log in LOGS.glob("suite-*.log")}
    return {name: (text.splitlines() or [""])[-1].strip() for name, text in texts.items()}


@contextmanager
def progress() -> Iterator[None]:
    """Print every now and then at which test each running suite is."""
    done = Event()

    def tell() -> None:
        before = last_lines()
        while not done.wait(BETWEEN):
            now = last_lines()
            for name in now:
                if now[name] != before.get(name):
                    say(f"    {name}: {now[name]}")
            before = now

    thread = Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main(arguments: list[str]) -> int:
    """Run the suite, with options for pytest if there are any; returns 1 if a test failed."""
    with progress():
        outcomes = check_here(WHOLE, [*LONG_FORM, *arguments], {"NBD_SOAK": "1"})
    say("\n".join(table(outcomes)))
    say(closing_line(outcomes))
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    run(main)
