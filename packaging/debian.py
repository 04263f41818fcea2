# SPDX-License-Identifier: LGPL-2.0-or-later
"""libnbd and its dependencies from Debian: packages of any architecture, or sources."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from console import CACHE, Failure, locked, log_path, must, output, say
from roots import AS_ROOT, derived, entering, scripts_for
from targets import Libraries, Part, Target, zig

# The source packages that libraries.sh builds, and their libraries.
SOURCES = {
    "gmp": frozenset({"libgmp"}),
    "nettle": frozenset({"libnettle", "libhogweed"}),
    "libtasn1-6": frozenset({"libtasn1"}),
    "libxml2": frozenset({"libxml2"}),
    "gnutls28": frozenset({"libgnutls"}),
    "libnbd": frozenset({"libnbd"}),
}

DOWNLOADS = CACHE / "downloads"
LIBRARIES_SH = Path(__file__).resolve().with_name("libraries.sh")

# The library is given by its path, because compilers may search other folders before those of -L.
_LIBNBD_PC = """\
includedir={include}
Name: libnbd
Description: NBD client library
Version: {version}
Cflags: -I${{includedir}}
Libs: {library}
"""


def libraries(target: Target, folder: Path) -> Libraries:
    """Get libnbd and its dependencies for a target, in a new folder."""
    folder.mkdir(parents=True)
    return (built if target.from_source else unpacked)(target, folder)


def unpacked(target: Target, folder: Path) -> Libraries:
    """Unpack them from Debian's packages, each into its own folder."""
    parts: list[Part] = []
    folders: set[Path] = set()
    for package in sorted(packages(target).glob("*.deb")):
        name, version = (
            output(["dpkg-deb", "--field", package, field], f"{package} cannot be read")
            for field in ("Package", "Version")
        )
        if name != "base-files" and not name.startswith(("lib", "zlib")):
            continue
        must(
            log(target),
            ["dpkg-deb", "--extract", package, folder / name],
            f"{package} cannot be unpacked",
        )
        purl = package_url(name, version, target.debian, target.suite)
        documents = folder / name / "usr" / "share" / "doc" / name
        if documents.is_symlink():  # to the folder of another package of the same source
            other = os.readlink(documents)
            documents = folder / other / "usr" / "share" / "doc" / other
        files = list((folder / name).rglob("*.so.*"))
        folders.update(file.parent for file in files)
        names = frozenset(file.name.partition(".so")[0] for file in files)
        parts.append(Part(name, version, purl, names, documents / "copyright"))
    (libnbd,) = (folder / "libnbd0").rglob("libnbd.so.0")
    version = next(part.version for part in parts if part.name == "libnbd0")
    pkgconfig = write_pkgconfig(folder, folder / "libnbd-dev" / "usr" / "include", libnbd, version)
    common = folder / "base-files" / "usr" / "share" / "common-licenses"
    return Libraries(pkgconfig, sorted(folders), parts, common)


def package_url(name: str, version: str, architecture: str, suite: str) -> str:
    """The package URL of a Debian package, for SBOMs."""
    quoted = urllib.parse.quote(version, safe="")
    return f"pkg:deb/debian/{name}@{quoted}?arch={architecture}&distro={suite}"


def write_pkgconfig(folder: Path, include: Path, library: Path, version: str) -> Path:
    """Write libnbd.pc, and return its folder."""
    pkgconfig = folder / "pkgconfig"
    pkgconfig.mkdir()
    upstream = version.rpartition("-")[0]
    text = _LIBNBD_PC.format(include=include, library=library, version=upstream)
    (pkgconfig / "libnbd.pc").write_text(text)
    return pkgconfig


def packages(target: Target) -> Path:
    """Download libnbd's packages and their dependencies; returns the folder."""
    say(f"downloading libnbd and its dependencies for {target.debian}, Debian {target.suite}")
    folder = DOWNLOADS / f"{target.suite}-{target.debian}"
    with scripts_for(target.suite) as scripts:
        command = [
            *(*AS_ROOT, "env", f"DEBOOTSTRAP_DIR={scripts}", "debootstrap", "--download-only"),
            *("--variant=minbase", f"--arch={target.debian}", "--include=libnbd-dev"),
            *(target.suite, folder),
        ]
        must(log(target), command, f"the packages for {target.debian} cannot be downloaded")
    return folder / "var" / "cache" / "apt" / "archives"


def built(target: Target, folder: Path) -> Libraries:
    """Build them from Debian's sources."""
    sources = folder / "sources"
    shutil.copytree(unpacked_sources(target.suite), sources, symlinks=True)
    must(
        log(target),
        ["bash", LIBRARIES_SH, sources, zig(), target.zig],
        f"the libraries for {target.platform} cannot be built",
        environ={**os.environ, "MAKEFLAGS": f"-j{os.cpu_count()}"},
        cwd=folder,
    )
    parts = []
    for name, files in SOURCES.items():
        lines = (sources / f"{name}.dsc").read_text().splitlines()
        version = next(line.split()[1] for line in lines if line.startswith("Version: "))
        purl = package_url(name, version, "source", target.suite)
        parts.append(Part(name, version, purl, files, sources / name / "debian" / "copyright"))
    prefix = folder / "root" / "usr"
    libnbd = prefix / "lib" / "libnbd.so.0"
    pkgconfig = write_pkgconfig(folder, prefix / "include", libnbd, parts[-1].version)
    common = source_root(target.suite) / "usr" / "share" / "common-licenses"
    return Libraries(pkgconfig, [libnbd.parent], parts, common)


def source_root(suite: str) -> Path:
    """A root whose apt knows the source packages of a suite."""
    root = derived(suite, "sources")
    known = root / "etc" / "apt" / "sources.list.d" / "sources.list"
    with locked(root):
        if not known.is_file():
            _, mirror, *_ = (root / "etc" / "apt" / "sources.list").read_text().split()
            # Security updates are in an archive of their own.
            lines = [
                f"deb-src {mirror} {suite} main",
                f"deb-src {mirror.rstrip('/')}-security {suite}-security main",
            ]
            write = ["sh", "-c", f'printf "%s\\n" "$@" >/{known.relative_to(root)}', "sh", *lines]
            must(
                log_path(f"root-{root.name}"), entering(root, write), f"{root} cannot be written to"
            )
    return root


def unpacked_sources(suite: str) -> Path:
    """Download and patch the sources; returns a folder with NAME/ and NAME.dsc for each."""
    folder = DOWNLOADS / f"{suite}-sources"
    root = source_root(suite)
    with locked(folder):
        if not folder.is_dir():
            say(f"downloading the sources of {', '.join(SOURCES)}, Debian {suite}")
            update = entering(root, ["apt-get", "update"])
            must(log_path(f"root-{root.name}"), update, f"apt cannot list the sources of {suite}")
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name in SOURCES:
                command = ["apt-get", "source", "--print-uris", "-qq", name]
                listed = output(entering(root, command), f"{suite} has no sources of {name}")
                unpack_source(name, listed.splitlines(), unfinished)
            unfinished.rename(folder)
    return folder


def forget() -> None:
    """Remove earlier downloads, because Debian may have published security updates since."""
    subprocess.run([*AS_ROOT, "rm", "-rf", str(DOWNLOADS)], check=True)


def unpack_source(name: str, listed: Iterable[str], folder: Path) -> None:
    """Download the files of a source package that apt has listed, and unpack them."""
    for line in listed:
        uri, file, _, checksum = shlex.split(line)
        if file.endswith(".asc"):  # not needed: apt has verified the checksums
            continue
        fetch(uri, folder / file, checksum.partition(":")[2])
        if file.endswith(".dsc"):
            (folder / file).rename(folder / f"{name}.dsc")
    # --no-check: the maintainer's key may not be on this machine.
    unpack = ["dpkg-source", "--no-check", "--extract", folder / f"{name}.dsc", folder / name]
    must(log_path(f"source-{name}"), unpack, f"{name} cannot be unpacked")


def fetch(uri: str, target: Path, sha256: str) -> None:
    """Download a file and compare its checksum."""
    with urllib.request.urlopen(uri) as response, target.open("wb") as file:
        shutil.copyfileobj(response, file)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != sha256:
        raise Failure(f"{uri} has the SHA-256 {found} instead of {sha256}; try again")


def log(target: Target) -> Path:
    """The log of the libraries for a target."""
    return log_path(f"libraries-{target.platform}")
