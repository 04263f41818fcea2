# SPDX-License-Identifier: LGPL-2.0-or-later
"""Bundled wheels: they contain libnbd and its dependencies, their licences, and an SBOM."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from console import Failure, clean_environment, log_path, must, new_log
from debian import libraries
from environments import tools
from sbom import bill_of_materials
from targets import Libraries, Part, Target, zig
from wheels import DIST

COMMON_LICENCE = re.compile(r"/usr/share/common-licenses/([A-Za-z]+[-.\w]*\w)")


def build_bundled(sdist: Path, target: Target) -> Path:
    """Build the bundled wheel for a target."""
    log = new_log(f"dist-{target.platform}")
    with tempfile.TemporaryDirectory(prefix="nbd-bundled-") as name:
        folder = Path(name)
        found = libraries(target, folder / "libraries")
        plain = compiled(sdist, target, found, folder)
        environ = clean_environment(PATH=f"{tools('dist')}:/usr/bin:/bin")
        repair = [
            *(tools("dist") / "auditwheel", "repair", "--only-plat"),
            *("--ldpaths", ":".join(map(str, found.folders))),
            *("--exclude", "libc.so"),  # zig's name for musl
            *("--wheel-dir", folder / "repaired", plain),
        ]
        must(log, repair, "auditwheel cannot repair the wheel", environ=environ)
        (repaired,) = (folder / "repaired").glob("*.whl")
        program = [tools("dist") / "python", "-m", "wheel"]
        must(log, [*program, "unpack", "--dest", folder, repaired], "the wheel cannot be unpacked")
        (unpacked,) = folder.glob("libnbd_cffi-*")
        describe(unpacked, found)
        must(log, [*program, "pack", "--dest-dir", DIST, unpacked], "the wheel cannot be packed")
    wheel = DIST / repaired.name
    if target.platform not in wheel.name:
        raise Failure(f"{wheel.name} is not for {target.platform}")
    return wheel


def compiled(sdist: Path, target: Target, found: Libraries, folder: Path) -> Path:
    """Build the wheel for the target, before libraries are added."""
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {zig()} cc -target {target.zig} "$@"\n')
    compiler.chmod(0o755)
    environ = clean_environment(
        CC=str(compiler),
        CFLAGS="-O2 -g0",
        LDSHARED=f"{compiler} -shared -s",
        PKG_CONFIG_LIBDIR=str(found.pkgconfig),
        NBD_CFFI_MODE="abi",
        NBD_CFFI_BUNDLED="1",
        # auditwheel does not recognise that zig has linked with musl.
        _PYTHON_HOST_PLATFORM=target.platform if target.is_musl else f"linux-{target.architecture}",
    )
    pip = [tools("dist") / "python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    must(
        log_path(f"dist-{target.platform}"),
        [*pip, "--wheel-dir", folder / "plain", sdist],
        f"no wheel for {target.platform}",
        environ=environ,
        cwd=Path("/"),
    )
    (plain,) = (folder / "plain").glob("*.whl")
    return plain


def describe(unpacked: Path, found: Libraries) -> None:
    """Add the SBOM and the licences of the libraries to a wheel's metadata."""
    (information,) = unpacked.glob("*.dist-info")
    files = sorted((unpacked / "libnbd_cffi.libs").iterdir())
    parts = {part.name: part for part in (owner(file, found.parts) for file in files)}
    added: set[str] = set()
    for part in parts.values():
        added |= add_licences(part, found.common_licences, information / "licenses")
    metadata = information / "METADATA"
    header, blank, body = metadata.read_text(encoding="utf-8").partition("\n\n")
    lines = "".join(f"\nLicense-File: {name}" for name in sorted(added))
    metadata.write_text(header + lines + blank + body, encoding="utf-8")
    boms = information / "sboms"
    boms.mkdir(exist_ok=True)
    (boms / "libraries.cdx.json").write_text(bill_of_materials(unpacked.name, parts.values()))


def owner(library: Path, parts: list[Part]) -> Part:
    """Return the package that a library in a wheel came from."""
    # auditwheel adds a digest to the file's name.
    name = re.sub(r"-[0-9a-f]{8}$", "", library.name.partition(".so")[0])
    for part in parts:
        if name in part.libraries:
            return part
    raise Failure(f"auditwheel added {library.name}, which is in none of the packages")


def add_licences(part: Part, common: Path, target: Path) -> set[str]:
    """Copy a package's licence and the texts that it refers to; returns the names of the files."""
    added = {f"{part.name}.txt"}
    shutil.copyfile(part.copyright, target / f"{part.name}.txt")
    text = part.copyright.read_text(encoding="utf-8", errors="replace")
    for name in COMMON_LICENCE.findall(text):
        if (common / name).is_file():
            shutil.copyfile(common / name, target / f"{name}.txt")
            added.add(f"{name}.txt")
    return added
