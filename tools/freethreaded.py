# SPDX-License-Identifier: LGPL-2.0-or-later
"""CPython without the GIL, which Debian has no package of: built from its source, once, and kept.

It is 3.13, the latest of which a stable Debian has the source.  NBD_FREE_THREADED names another.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from console import locked, must, new_log, say
from environments import QUIET, tools
from roots import cache, derived, entering

#: Download the source in a Debian root: apt verifies it.
_DOWNLOAD = """
sed -n 's/^deb /deb-src /p' /etc/apt/sources.list >/etc/apt/sources.list.d/sources.list
apt-get update
cd /srv
apt-get source --download-only python3.13
"""


def interpreter() -> str:
    """Return the command of a free-threaded CPython, which is built unless that was done."""
    named = os.environ.get("NBD_FREE_THREADED")
    if named:
        return named
    folder = cache().with_name("python3.13t")
    complete = folder / "complete"
    with locked(folder):
        if not complete.is_file():
            build(folder)
            complete.touch()
    return str(folder / "bin" / "python3.13t")


def build(folder: Path) -> None:
    """Build it, and install it into a folder."""
    say(f"building CPython without the GIL in {folder}")
    log = new_log("python3.13t")
    root = derived("trixie", "source")
    download = entering(root, ["sh", "-ec", _DOWNLOAD])
    must(log, download, "the source of CPython cannot be downloaded; it needs a Debian mirror")
    (source,) = (root / "srv").glob("python3.13_*.orig.tar.xz")
    with tempfile.TemporaryDirectory(prefix="nbd-python-") as name:
        steps: list[Sequence[object]] = [
            ["tar", "-xf", source, "--strip-components=1"],
            ["./configure", "--disable-gil", f"--prefix={folder}"],
            ["make", f"-j{os.cpu_count()}"],
            ["make", "install"],
        ]
        for step in steps:
            must(log, step, "CPython without the GIL cannot be built", cwd=Path(name))


def install_cffi(environment: Path) -> None:
    """Install cffi into an environment.

    It refuses to be built for CPython 3.13 without the GIL, where a few functions of CPython are
    not safe yet.  That is good enough for tests, so the check is left out.
    """
    log = new_log(f"cffi-{environment.name}")
    with tempfile.TemporaryDirectory(prefix="nbd-cffi-") as name:
        folder = Path(name)
        download = ["download", *QUIET[:-1], "--no-deps", "--no-binary", "cffi", "--dest", folder]
        failure = "cffi cannot be downloaded; it needs a package index"
        must(log, [tools("pip") / "pip", *download, "cffi"], failure)
        (source,) = folder.glob("cffi-*.tar.gz")
        must(log, ["tar", "-xf", source, "-C", folder, "--strip-components=1"], failure)
        setup = folder / "setup.py"
        setup.write_text(setup.read_text().replace("sys.version_info < (3, 14)", "False"))
        install = ["-m", "pip", "install", *QUIET, "--no-deps", "--no-build-isolation", folder]
        failure = "cffi cannot be built (Debian: apt install libffi-dev)"
        must(log, [environment / "bin" / "python", *install], failure)
