# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run dist: build the sdist and all wheels into dist/, verify each of them, and print a table."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tools"))

from bundled import build_bundled
from console import Failure, must, new_log, run, say
from debian import forget
from environments import Environment, tools, venv
from index import write_index
from muslpython import with_musl
from roots import able_to_run
from targets import TARGETS, Target
from verify import Found, installable, pythons, verify_here, verify_in_root
from wheels import DIST, FOR_SYSTEM, build_sdist, build_wheel, set_time

EMULATED = "trixie-arm64"
PYTHON, PYPY = "/usr/bin/python3", "/usr/bin/pypy3"

# The roots and interpreters that verify each bundled wheel.
VERIFIED_IN = {
    "manylinux_2_38_x86_64": (
        *(("trixie", PYTHON), ("trixie", PYPY)),
        *(("forky", PYTHON), ("forky", "/usr/bin/python3.15")),
    ),
    "manylinux_2_38_aarch64": ((EMULATED, PYTHON),),
    "manylinux_2_17_x86_64": (("bullseye", PYTHON), ("bookworm", PYTHON), ("bookworm", PYPY)),
    "manylinux_2_17_aarch64": ((EMULATED, PYTHON),),
    "musllinux_1_2_x86_64": (("trixie", "/opt/python-x86_64/bin/python3"),),
    "musllinux_1_2_aarch64": ((EMULATED, "/opt/python-aarch64/bin/python3"),),
}
HEADINGS = ("file", "tag", "size", "verified on", "mode", "libnbd", "GnuTLS")

Row = tuple[Path, list[Found]]


def builder(interpreter: str, mode: str) -> Environment:
    """An environment that can build wheels; the package is not installed there."""
    environment = Environment(interpreter, mode)
    base = os.environ["NBD_PYTHON" if interpreter == "cpython" else "NBD_PYPY"]
    venv(environment.folder, base, "suite")
    return environment


def here(distribution: Path, interpreters: Iterable[str], mode: str) -> Row:
    """Verify a distribution with interpreters of this machine."""
    found = []
    for python in interpreters:
        found.append(verify_here(distribution, python, mode))
        say(f"  {distribution.name}: {found[-1].where}, {found[-1].mode}, {found[-1].libnbd}")
    return distribution, found


def in_roots(target: Target, wheels: dict[Target, Path]) -> Row:
    """Verify a bundled wheel in Debian roots, where pip chooses among all bundled wheels."""
    wheel = wheels[target]
    # The one root for aarch64 is new.  There pip would never choose the wheel for old systems.
    is_alone = target.architecture == "aarch64" and target.from_source
    offered = [wheel] if is_alone else list(wheels.values())
    found = []
    for suite, python in VERIFIED_IN[target.platform]:
        reason = obstacle(suite)
        if reason:
            found.append(Found(f"{suite}: not run, {reason}"))
        else:
            found.append(verify_in_root(root_for(target, suite), wheel, offered, python))
        say(f"  {wheel.name}: {found[-1].where}")
    return wheel, found


def root_for(target: Target, suite: str) -> Path:
    """The root in which a target's wheel is verified."""
    return with_musl(target) if target.is_musl else installable(suite)


def prepare_roots(targets: Iterable[Target]) -> None:
    """Make the roots that verify the wheels, apart from those that cannot run here."""
    for target in targets:
        for suite, _ in VERIFIED_IN[target.platform]:
            if not obstacle(suite):
                root_for(target, suite)


def chosen(arguments: Sequence[str]) -> list[Target]:
    """The targets whose wheels can be run here; with --unverified, all of them."""
    if set(arguments) - {"--unverified"}:
        raise Failure("the only option of dist is --unverified")
    targets = []
    for target in TARGETS:
        reason = "".join({obstacle(suite) for suite, _ in VERIFIED_IN[target.platform]})
        if reason and not arguments:
            say(f"no wheel for {target.platform}, unless with --unverified: {reason}")
        else:
            targets.append(target)
    return targets


def obstacle(suite: str) -> str:
    """Why this machine cannot run the programs of a root; empty if it can."""
    try:
        able_to_run(suite)
    except Failure as reason:
        return str(reason)
    return ""


def tag(path: Path) -> str:
    """The tag in a wheel's name."""
    return "-".join(path.stem.split("-")[2:]) if path.suffix == ".whl" else "sdist"


def table(rows: list[Row]) -> list[str]:
    """A row for each distribution and interpreter."""
    cells: list[tuple[str, ...]] = [HEADINGS]
    for path, found in rows:
        size = f"{path.stat().st_size / 1024:.0f} KiB"
        head = (path.name.split("-")[0], tag(path), size)
        for number, one in enumerate(found):
            first = head if number == 0 else ("",) * len(head)
            cells.append((*first, one.where, one.mode, one.libnbd, one.gnutls))
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADINGS))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]


def main(arguments: list[str]) -> int:
    """Build and verify everything; a failure of either ends the command."""
    started = time.monotonic()
    targets = chosen(arguments)
    shutil.rmtree(DIST, ignore_errors=True)
    FOR_SYSTEM.mkdir(parents=True)
    set_time()
    forget()
    log = new_log("dist-twine")
    pypy = os.environ["NBD_PYPY"]
    every = pythons()
    programs = tools("dist")

    say("building")
    sdist = build_sdist()
    with ThreadPoolExecutor(max_workers=2) as pool:
        # First, because it takes longest: qemu runs programs, and CPython is compiled.
        preparing = pool.submit(prepare_roots, targets)
        building = {one: pool.submit(build_bundled, sdist, one) for one in reversed(targets)}
        api = build_wheel(sdist, builder("cpython", "api"))
        api_pypy = build_wheel(sdist, builder("pypy", "api"))
        abi = build_wheel(sdist, builder("cpython", "abi"))
        bundled = {target: building[target].result() for target in targets}
        preparing.result()
    public = [sdist, *bundled.values()]
    check = [programs / "twine", "check", "--strict", *public, *FOR_SYSTEM.iterdir()]
    must(log, check, "twine check failed")
    write_index(DIST, public)
    say(f"verifying in fresh environments, after {time.monotonic() - started:.0f} s")
    with ThreadPoolExecutor(max_workers=2) as pool:
        verifying = {one: pool.submit(in_roots, one, bundled) for one in targets}
        rows = [
            here(sdist, [os.environ["NBD_PYTHON"], pypy], "API"),
            here(api, every, "API"),
            here(api_pypy, [pypy], "API"),
            here(abi, [*every, pypy], "ABI"),
            *(verifying[target].result() for target in targets),
        ]
    say("\n".join(table(rows)))
    say(f"all: {time.monotonic() - started:.0f} s")
    verified = sum(bool(one.libnbd) for _, found in rows for one in found)
    say(f"{verified} passed, 0 failed")
    return 0


if __name__ == "__main__":
    run(main)
