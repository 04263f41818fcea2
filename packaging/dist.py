# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run dist: build every distribution into dist/, verify each of them, and print a table."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tools"))

from bundled import build_bundled
from console import Failure, log_path, must, run, say
from debian import forget
from environments import Environment, tools, venv
from index import write_index
from roots import able_to_run
from targets import TARGETS, Target
from verify import Found, installable, pythons, verify_here, verify_in_root
from wheels import DIST, FOR_SYSTEM, build_sdist, build_wheel, set_time

EMULATED = "trixie-arm64"
PYTHON, PYPY = "/usr/bin/python3", "/usr/bin/pypy3"

# Where the self-contained wheels are verified: the roots, and the interpreters there.
VERIFIED_IN = {
    "manylinux_2_38_x86_64": (("trixie", PYTHON), ("trixie", PYPY), ("forky", PYTHON)),
    "manylinux_2_38_aarch64": ((EMULATED, PYTHON),),
    "manylinux_2_17_x86_64": (("bullseye", PYTHON), ("bookworm", PYTHON), ("bookworm", PYPY)),
    "manylinux_2_17_aarch64": ((EMULATED, PYTHON),),
}
HEADINGS = ("file", "tag", "size", "glibc", "verified on", "mode", "libnbd", "GnuTLS")
GLIBC = re.compile(rb"\bGLIBC_(\d+)\.(\d+)")

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


def in_roots(target: Target, wheels: dict[Target, Path]) -> Row:
    """Verify a self-contained wheel in Debian roots, where pip may take any that fits."""
    wheel = wheels[target]
    # Programs of another processor have a new root only; an old wheel is the only one offered.
    is_only = target.architecture == "aarch64" and target.from_source
    offered = [wheel] if is_only else list(wheels.values())
    if target.is_musl:
        return wheel, [Found("not run: Debian has no Python for musl")]
    found = []
    for suite, python in VERIFIED_IN[target.platform]:
        reason = obstacle(suite)
        if reason:
            found.append(Found(f"{suite}: not run, {reason}"))
        else:
            found.append(verify_in_root(suite, wheel, offered, python))
        say(f"  {wheel.name}: {found[-1].where}: {found[-1].note}")
    return wheel, found


def obstacle(suite: str) -> str:
    """Why programs of a root cannot be run on this machine; nothing if they can."""
    try:
        able_to_run(suite)
    except Failure as reason:
        return str(reason)
    return ""


def tag(path: Path) -> str:
    """The tag in a wheel's name."""
    return "-".join(path.stem.split("-")[2:]) if path.suffix == ".whl" else "sdist"


def oldest_glibc(path: Path) -> str:
    """The oldest glibc that has all functions that a wheel asks for."""
    if path.suffix != ".whl":
        return "-"
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if ".so" in name]
        versions = [tuple(map(int, v)) for n in names for v in GLIBC.findall(wheel.read(n))]
    return "{}.{}".format(*max(versions)) if versions else "-"


def table(rows: list[Row]) -> list[str]:
    """A line for each distribution and each interpreter that it was verified with."""
    cells: list[tuple[str, ...]] = [HEADINGS]
    for path, found in rows:
        size = f"{path.stat().st_size / 1024:.0f} KiB"
        head = (path.name.split("-")[0], tag(path), size, oldest_glibc(path))
        for number, one in enumerate(found):
            first = head if number == 0 else ("",) * len(head)
            cells.append((*first, one.where, one.mode, one.libnbd, one.gnutls))
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADINGS))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]


def main(arguments: list[str]) -> int:
    """Build, verify, print."""
    started = time.monotonic()
    shutil.rmtree(DIST, ignore_errors=True)
    FOR_SYSTEM.mkdir(parents=True)
    set_time()
    forget()
    log = log_path("dist-twine")
    log.unlink(missing_ok=True)
    pypy = os.environ["NBD_PYPY"]
    every = pythons()
    programs = tools("dist")

    say("building")
    sdist = build_sdist()
    with ThreadPoolExecutor(max_workers=2) as pool:
        # The slowest first: a root of another processor is made by a processor that is emulated.
        root = None if obstacle(EMULATED) else pool.submit(installable, EMULATED)
        building = {one: pool.submit(build_bundled, sdist, one) for one in reversed(TARGETS)}
        api = build_wheel(sdist, builder("cpython", "api"))
        api_pypy = build_wheel(sdist, builder("pypy", "api"))
        abi = build_wheel(sdist, builder("cpython", "abi"))
        contained = {target: building[target].result() for target in TARGETS}
        if root:
            root.result()
    public = [sdist, *contained.values()]
    check = [programs / "twine", "check", "--strict", *public, *FOR_SYSTEM.iterdir()]
    must(log, check, "twine objects")
    write_index(DIST, public)
    say(f"built after {time.monotonic() - started:.0f} s")

    say("verifying: fresh environments, from another folder")
    with ThreadPoolExecutor(max_workers=2) as pool:
        verifying = {one: pool.submit(in_roots, one, contained) for one in TARGETS}
        rows = [
            here(sdist, [os.environ["NBD_PYTHON"], pypy], "API"),
            here(api, every, "API"),
            here(api_pypy, [pypy], "API"),
            here(abi, [*every, pypy], "ABI"),
            *(verifying[target].result() for target in TARGETS),
        ]
    say("\n".join(table(rows)))
    say(f"all: {time.monotonic() - started:.0f} s")
    verified = sum(bool(one.libnbd) for _, found in rows for one in found)
    say(f"{verified} passed, 0 failed")
    return 0


if __name__ == "__main__":
    run(main)
