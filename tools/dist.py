# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run dist: build every distribution into dist/, verify each of them, and print a table."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from check import debian_here
from console import Failure, log_path, must, run, say
from environments import Environment, tools, venv
from verify import Found, pythons, verify_here, verify_in_root
from wheels import DIST, build_sdist, build_wheel, repair

NEWER = {"bookworm": ("bookworm", "trixie"), "trixie": ("trixie",), "forky": ("forky",)}
HEADINGS = ("file", "tag", "size", "verified on", "mode", "libnbd")

Row = tuple[Path, list[Found]]


def builder(interpreter: str, mode: str) -> Environment:
    """An environment that can build wheels; the package itself need not be in it."""
    environment = Environment(interpreter, mode)
    base = os.environ["NBD_PYTHON" if interpreter == "cpython" else "NBD_PYPY"]
    venv(environment.folder, base, "suite")
    return environment


def here(distribution: Path, interpreters: Iterable[str], mode: str) -> Row:
    """Verify a distribution with some interpreters of this machine."""
    found = []
    for python in interpreters:
        found.append(verify_here(distribution, python, mode))
        say(f"  {distribution.name}: {found[-1].where}, {found[-1].mode}, {found[-1].libnbd}")
    return distribution, found


def in_roots(wheel: Path) -> Row:
    """Verify the self-contained wheel in Debian roots with the same or a newer glibc."""
    suites = NEWER.get(debian_here())
    if suites is None:
        raise Failure("the self-contained wheel is built and verified on Debian 12 or newer")
    found = []
    for suite in suites:
        for python in ("/usr/bin/python3", "/usr/bin/pypy3"):
            found.append(verify_in_root(suite, wheel, python, "ABI"))
            say(f"  {wheel.name}: {found[-1].where}: {found[-1].note}")
    return wheel, found


def tag(path: Path) -> str:
    """The tag in a wheel's name."""
    return "-".join(path.stem.split("-")[2:]) if path.suffix == ".whl" else "sdist"


def table(rows: list[Row]) -> list[str]:
    """A line for each distribution and each interpreter that it was verified with."""
    cells = [HEADINGS]
    for path, found in rows:
        size = f"{path.stat().st_size / 1024:.0f} KiB"
        for number, one in enumerate(found):
            head = (path.name.split("-")[0], tag(path), size) if number == 0 else ("", "", "")
            cells.append((*head, one.where, one.mode, one.libnbd))
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADINGS))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]


def main(arguments: list[str]) -> int:
    """Build, verify, print."""
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    log = log_path("dist-twine")
    log.unlink(missing_ok=True)
    pypy = os.environ["NBD_PYPY"]
    every = pythons()

    say("building")
    sdist = build_sdist()
    api = build_wheel(sdist, builder("cpython", "api"))
    api_pypy = build_wheel(sdist, builder("pypy", "api"))
    abi = build_wheel(sdist, builder("cpython", "abi"))
    contained = repair(abi)
    must(log, [tools("dist") / "twine", "check", "--strict", *DIST.iterdir()], "twine objects")

    say("verifying: fresh environments, from another folder")
    rows = [
        here(sdist, [os.environ["NBD_PYTHON"], pypy], "API"),
        here(api, every, "API"),
        here(api_pypy, [pypy], "API"),
        here(abi, [*every, pypy], "ABI"),
        in_roots(contained),
    ]
    say("\n".join(table(rows)))
    verified = sum(len(found) for _, found in rows)
    say(f"{verified} passed, 0 failed")
    return 0


if __name__ == "__main__":
    run(main)
