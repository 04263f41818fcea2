# SPDX-License-Identifier: LGPL-2.0-or-later
"""The distributions: the sdist, the wheels that are built from it, and the self-contained wheel."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from console import ROOT, Failure, clean_environment, log_path, must, output
from environments import Environment, tools

DIST = ROOT / "dist"
NOT_IN_SDIST = shutil.ignore_patterns(
    ".git", ".cache", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.so"
)
COMMON_LICENSES = Path("/usr/share/common-licenses")


def newest(pattern: str) -> Path:
    """The one file in dist/ of a pattern."""
    (found,) = DIST.glob(pattern)
    return found


def build_sdist() -> Path:
    """Build the sdist as anybody's tool does, in an isolated environment."""
    log = log_path("dist-sdist")
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="nbd-sdist-") as name:
        folder = Path(name, "source")
        shutil.copytree(ROOT, folder, ignore=NOT_IN_SDIST)
        command = [tools("dist") / "python", "-m", "build", "--sdist", "--outdir", DIST, folder]
        must(log, command, "the sdist cannot be built", environ=clean_environment())
    return newest("*.tar.gz")


def build_wheel(sdist: Path, environment: Environment) -> Path:
    """Build a wheel from the sdist alone, with an interpreter and in a mode."""
    log = log_path(f"dist-wheel-{environment.name}")
    log.unlink(missing_ok=True)
    before = set(DIST.glob("*.whl"))
    pip = [environment.python, "-m", "pip", "wheel", "--no-input", "--no-deps"]
    must(
        log,
        [*pip, "--wheel-dir", DIST, sdist],
        f"no wheel for {environment.name}",
        environ=clean_environment(NBD_CFFI_MODE=environment.mode),
        cwd=Path("/"),
    )
    (built,) = set(DIST.glob("*.whl")) - before
    return built


def repair(wheel: Path) -> Path:
    """Make a self-contained wheel: libnbd and what it needs inside, with their licences."""
    bin_folder = tools("dist")
    log = log_path("dist-repair")
    log.unlink(missing_ok=True)
    environ = clean_environment(PATH=f"{bin_folder}:{os.environ['PATH']}")
    with tempfile.TemporaryDirectory(prefix="nbd-repair-") as name:
        folder = Path(name)
        repaired = [bin_folder / "auditwheel", "repair", "--wheel-dir", folder / "repaired", wheel]
        must(log, repaired, "auditwheel cannot repair the wheel", environ=environ)
        (found,) = (folder / "repaired").glob("*.whl")
        program = [bin_folder / "python", "-m", "wheel"]
        must(log, [*program, "unpack", "--dest", folder, found], "the wheel cannot be unpacked")
        (unpacked,) = folder.glob("libnbd_cffi-*")
        add_licences(unpacked)
        must(log, [*program, "pack", "--dest-dir", DIST, unpacked], "the wheel cannot be packed")
    return newest("*manylinux*.whl")


def add_licences(unpacked: Path) -> None:
    """Put the licences of the libraries of a wheel into its metadata."""
    (information,) = unpacked.glob("*.dist-info")
    target = information / "licenses"
    added: set[str] = set()
    for library in sorted((unpacked / "libnbd_cffi.libs").iterdir()):
        for source, name in licence_files(library):
            if name not in added:
                shutil.copyfile(source, target / name)
                added.add(name)
    metadata = information / "METADATA"
    header, blank, body = metadata.read_text(encoding="utf-8").partition("\n\n")
    lines = "".join(f"\nLicense-File: {name}" for name in sorted(added))
    metadata.write_text(header + lines + blank + body, encoding="utf-8")


def licence_files(library: Path) -> Iterator[tuple[Path, str]]:
    """The licence of the package that a library came from, and the texts that it refers to."""
    # auditwheel has put a digest into the file's name.
    name = re.sub(r"-[0-9a-f]{8}(?=\.)", "", library.name)
    package = owner(name)
    copyright_file = Path("/usr/share/doc", package, "copyright")
    if not copyright_file.is_file():
        raise Failure(f"{copyright_file} is missing, the licence of {name}")
    yield copyright_file, f"{package}.txt"
    text = copyright_file.read_text(encoding="utf-8", errors="replace")
    for common in sorted(set(re.findall(r"/usr/share/common-licenses/([A-Za-z]+[-.\w]*\w)", text))):
        if (COMMON_LICENSES / common).is_file():
            yield COMMON_LICENSES / common, f"{common}.txt"


def owner(library: str) -> str:
    """The Debian package that a shared library of this machine belongs to."""
    for line in output(["/sbin/ldconfig", "-p"], "ldconfig fails").splitlines():
        path = line.strip().partition(" => ")[2]
        real = os.path.realpath(path)
        if library in (os.path.basename(path), os.path.basename(real)):
            for candidate in (path, real):
                try:
                    return output(["dpkg-query", "-S", candidate], "").split(":")[0]
                except Failure:
                    continue
    raise Failure(f"no Debian package has {library}; the self-contained wheel is built on Debian")
