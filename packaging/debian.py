# SPDX-License-Identifier: LGPL-2.0-or-later
"""libnbd and what it needs from Debian: its packages of any architecture, or its sources."""

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

from console import CACHE, Failure, log_path, must, output, say
from roots import AS_ROOT, derived, entering, locked, scripts_for
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

# The library by its path: compilers may have other folders before any that is given by -L.
_LIBNBD_PC = """\
includedir={include}
Name: libnbd
Description: NBD client library
Version: {version}
Cflags: -I${{includedir}}
Libs: {library}
"""


def libraries(target: Target, folder: Path) -> Libraries:
    """libnbd and what it needs for a target; a new folder takes the files."""
    folder.mkdir(parents=True)
    return (built if target.from_source else unpacked)(target, folder)


def unpacked(target: Target, folder: Path) -> Libraries:
    """Take them from Debian's packages, each unpacked into a folder of its own."""
    parts: list[Part] = []
    folders: set[Path] = set()
    for package in sorted(packages(target).glob("*.deb")):
        name, version = (
            output(["dpkg-deb", "--field", package, field], f"{package} cannot be read")
            for field in ("Package", "Version")
        )
        if name != "base-files" and not name.startswith(("lib", "zlib")):
            continue
        must(log(target), ["dpkg-deb", "--extract", package, folder / name], f"bad: {package}")
        purl = package_url(name, version, target.debian, target.suite)
        documents = folder / name / "usr" / "share" / "doc" / name
        if documents.is_symlink():  # to those of a package of the same source
            other = os.readlink(documents)
            documents = folder / other / "usr" / "share" / "doc" / other
        files = list((folder / name).rglob("*.so.*"))
        folders.update(file.parent for file in files)
        names = frozenset(file.name.partition(".so")[0] for file in files)
        parts.append(Part(name, version, purl, names, documents / "copyright"))
    (libnbd,) = (folder / "libnbd0").rglob("libnbd.so.0")
    version = next(part.version for part in parts if part.name == "libnbd0")
    pkgconfig = to_link_with(folder, folder / "libnbd-dev" / "usr" / "include", libnbd, version)
    common = folder / "base-files" / "usr" / "share" / "common-licenses"
    return Libraries(pkgconfig, sorted(folders), parts, common)


def package_url(name: str, version: str, architecture: str, suite: str) -> str:
    """The name of a package of Debian's for all the world, as SBOMs write it."""
    quoted = urllib.parse.quote(version, safe="")
    return f"pkg:deb/debian/{name}@{quoted}?arch={architecture}&distro={suite}"


def to_link_with(folder: Path, include: Path, library: Path, version: str) -> Path:
    """A folder with a libnbd.pc."""
    pkgconfig = folder / "pkgconfig"
    pkgconfig.mkdir()
    upstream = version.rpartition("-")[0]
    text = _LIBNBD_PC.format(include=include, library=library, version=upstream)
    (pkgconfig / "libnbd.pc").write_text(text)
    return pkgconfig


def packages(target: Target) -> Path:
    """A folder with libnbd's packages and all that they depend on."""
    say(f"getting the packages of libnbd, {target.suite}, {target.debian}")
    folder = DOWNLOADS / f"{target.suite}-{target.debian}"
    with scripts_for(target.suite) as scripts:
        command = [
            *(*AS_ROOT, "env", f"DEBOOTSTRAP_DIR={scripts}", "debootstrap", "--download-only"),
            *("--variant=minbase", f"--arch={target.debian}", "--include=libnbd-dev"),
            *(target.suite, folder),
        ]
        must(log(target), command, f"no packages for {target.debian}")
    return folder / "var" / "cache" / "apt" / "archives"


def built(target: Target, folder: Path) -> Libraries:
    """Build them from Debian's sources."""
    sources = folder / "sources"
    shutil.copytree(unpacked_sources(target.suite), sources, symlinks=True)
    must(
        log(target),
        ["bash", LIBRARIES_SH, sources, zig(), target.architecture, target.zig],
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
    pkgconfig = to_link_with(folder, prefix / "include", libnbd, parts[-1].version)
    common = source_root(target.suite) / "usr" / "share" / "common-licenses"
    return Libraries(pkgconfig, [libnbd.parent], parts, common)


def source_root(suite: str) -> Path:
    """A root whose apt can know the sources of a Debian."""
    root = derived(suite, "sources")
    known = root / "etc" / "apt" / "sources.list.d" / "sources.list"
    with locked(root.name):
        if not known.is_file():
            _, mirror, *_ = (root / "etc" / "apt" / "sources.list").read_text().split()
            # What is repaired comes by way of the security archive, beside the archive itself.
            lines = [
                f"deb-src {mirror} {suite} main",
                f"deb-src {mirror.rstrip('/')}-security {suite}-security main",
            ]
            write = ["sh", "-c", f'printf "%s\\n" "$@" >/{known.relative_to(root)}', "sh", *lines]
            must(log_path(f"root-{root.name}"), entering(root, write), f"{root} is read only")
    return root


def unpacked_sources(suite: str) -> Path:
    """A folder with the sources, Debian's patches applied: NAME/ and NAME.dsc for each."""
    folder = DOWNLOADS / f"{suite}-sources"
    root = source_root(suite)
    with locked(folder.name):
        if not folder.is_dir():
            say(f"getting the sources of {', '.join(SOURCES)}, {suite}")
            update = entering(root, ["apt-get", "update"])
            must(log_path(f"root-{root.name}"), update, f"{suite} has no list of its sources")
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
    """Remove what was got from Debian earlier: something may have been repaired since."""
    subprocess.run([*AS_ROOT, "rm", "-rf", str(DOWNLOADS)], check=True)


def unpack_source(name: str, listed: Iterable[str], folder: Path) -> None:
    """Get the files of a source package that apt has listed, and unpack them."""
    for line in listed:
        uri, file, _, checksum = shlex.split(line)
        if file.endswith(".asc"):  # apt has the archive's signature, which is for all files
            continue
        fetch(uri, folder / file, checksum.partition(":")[2])
        if file.endswith(".dsc"):
            (folder / file).rename(folder / f"{name}.dsc")
    # The signature of the one who packed it is not checked: his key need not be on this machine.
    unpack = ["dpkg-source", "--no-check", "--extract", folder / f"{name}.dsc", folder / name]
    must(log_path(f"source-{name}"), unpack, f"{name} cannot be unpacked")


def fetch(uri: str, target: Path, sha256: str) -> None:
    """Get a file that must have a checksum."""
    with urllib.request.urlopen(uri) as response, target.open("wb") as file:
        shutil.copyfileobj(response, file)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != sha256:
        raise Failure(f"{uri} has the SHA-256 {found}, apt says {sha256}; try again")


def log(target: Target) -> Path:
    """Where the making of the libraries for a target is written down."""
    return log_path(f"libraries-{target.platform}")
