# SPDX-License-Identifier: LGPL-2.0-or-later
"""The C files of the shim include their own header first, and use each other in one direction."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILES = sorted(path.name for path in CSRC.iterdir())
#: The files that define functions.  Each may use those before it.
ORDER = (
    *("address", "buffer", "queuefile", "tls", "upcall"),
    *("handle", "wait", "watch", "pieces", "queue"),
)
#: The headers of the flat ABI, and those with the structs that several files share.
SHARED = ("nbdshim.h", "nbdglue.h", "queue.h", "internal.h", "queue_internal.h")


def included(name: str) -> list[str]:
    """Return the headers of the shim that a file includes, in order."""
    return re.findall(r'^#include "(.+)"', (CSRC / name).read_text(encoding="utf-8"), re.M)


def test_every_file_has_a_place_in_the_order() -> None:
    assert {Path(name).stem for name in FILES if name.endswith(".c")} == set(ORDER)
    headers = {name for name in FILES if name.endswith(".h")}
    assert headers <= {*SHARED, *(f"{stem}.h" for stem in ORDER)}


@pytest.mark.parametrize("stem", ORDER)
def test_a_file_includes_its_own_header_first(stem: str) -> None:
    own = f"{stem}.h" if f"{stem}.h" in FILES else "nbdshim.h"
    assert included(f"{stem}.c")[0] == own


@pytest.mark.parametrize("name", [name for name in FILES if Path(name).stem in ORDER])
def test_a_file_uses_only_those_before_it(name: str) -> None:
    stem = Path(name).stem
    before = ORDER[: ORDER.index(stem) + 1]
    assert set(included(name)) <= {*SHARED, *(f"{one}.h" for one in before)}
