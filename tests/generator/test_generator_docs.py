"""The documentation of the calls: each call has exactly one entry, and the entry is long enough.

NBD_EXTRA_HEADERS names further libnbd.h files, separated by colons, such as a newer version's,
whose calls must also have entries.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from support.checkout import CHECKOUT

from generator.calls import Documentation, load_documentation, parse_documentation
from generator.library import find_library
from generator.read import read
from generator.waiting import stoppable

DOCS = CHECKOUT / "generator" / "docs"
ENTRIES = load_documentation(DOCS)
EXTRA = [Path(name) for name in os.environ.get("NBD_EXTRA_HEADERS", "").split(":") if name]
LEAST = 200  # characters
EXAMPLES = 40


def version(text: str) -> tuple[int, ...]:
    """Return a version as numbers, which can be compared."""
    return tuple(int(part) for part in text.split("."))


def test_no_call_has_two_entries() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.txt"))]
    found = Counter(name for text in texts for name, _ in parse_documentation(text))
    assert [name for name, count in found.items() if count > 1] == []


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.txt")), ids=lambda path: path.name)
def test_every_title_of_an_entry_is_read_as_one(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    titles = [line for line in text.splitlines() if line.startswith("=")]
    assert len(titles) == len(list(parse_documentation(text)))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_says_enough(name: str) -> None:
    text = ENTRIES[name].text
    assert len(text) >= LEAST
    summary = text.split("\n", 1)[0]
    assert summary.endswith((".", "?"))


def test_every_call_of_the_installed_header_has_an_entry() -> None:
    functions = stoppable(read(find_library().header)).functions
    assert [f.name for f in functions if f.name not in ENTRIES] == []


def test_an_entry_is_of_the_installed_header_or_of_a_later_libnbd() -> None:
    library = find_library()
    known = {f.name for f in stoppable(read(library.header)).functions}
    here = version(library.version)
    strange = [
        name for name, e in ENTRIES.items() if name not in known and version(e.since) <= here
    ]
    assert strange == []


@pytest.mark.skipif(not EXTRA, reason="NBD_EXTRA_HEADERS names no newer libnbd.h")
def test_entries_and_the_calls_of_all_headers_are_the_same() -> None:
    headers = [find_library().header, *EXTRA]
    known = {f.name for path in headers for f in stoppable(read(path)).functions}
    assert set(ENTRIES) == known


def test_many_entries_have_an_example() -> None:
    assert sum(has_example(entry) for entry in ENTRIES.values()) >= EXAMPLES


def has_example(entry: Documentation) -> bool:
    """Return whether an entry shows how to make the call."""
    return "Example:\n    >>> " in entry.text
