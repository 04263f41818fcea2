# SPDX-License-Identifier: LGPL-2.0-or-later
"""Virtual environments in .cache: made when first asked for, and when what is in them changed.

One for each interpreter and mode holds the package, built and installed as pip does it; others
hold tools.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from console import CACHE, ROOT, Failure, clean_environment, locked, must, new_log, output, say

REQUIREMENTS = ROOT / "tools" / "requirements"

#: What the package is built from.
SOURCES = (
    *("build_nbd.py", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in"),
    *("README.md", "LICENSE", "nbdsh.py", "libnbd_cffi.py", "csrc", "generator", "nbd"),
)

QUIET = ("--quiet", "--disable-pip-version-check", "--no-input", "--no-compile")


class Environment(NamedTuple):
    """An interpreter, and the mode that the package is built in for it."""

    interpreter: str  # "cpython", "pypy", or the command of another one, such as "python3.15"
    mode: str  # "api", "abi", or "wheel": what NBD_WHEEL names
    requirements: str = "suite"  # the file of tools/requirements that lists what else is in it

    @property
    def name(self) -> str:
        more = f"-{self.requirements}" if self.requirements == "ecosystem" else ""
        return f"{Path(self.interpreter).name}-{self.mode}{more}"

    @property
    def folder(self) -> Path:
        return CACHE / "environments" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


ALL = tuple(Environment(i, m) for i in ("cpython", "pypy") for m in ("api", "abi"))
#: The interpreter, and the requirements, of environments without the GIL.
FREE_THREADED = "free-threaded"
OF_WHEEL = tuple(Environment(interpreter, "wheel") for interpreter in ("cpython", "pypy"))


def base_interpreter(interpreter: str) -> str:
    """The command that makes environments for an interpreter."""
    if interpreter == FREE_THREADED:
        import freethreaded  # it imports this module

        return freethreaded.interpreter()
    variable = {"cpython": "NBD_PYTHON", "pypy": "NBD_PYPY"}.get(interpreter)
    return os.environ[variable] if variable else interpreter


def source_files() -> list[Path]:
    """Every file that the package is built from."""
    files: list[Path] = []
    for name in SOURCES:
        path = ROOT / name
        files += path.rglob("*") if path.is_dir() else [path]
    return sorted(f for f in files if f.is_file() and f.suffix not in (".pyc", ".so"))


def digest(*parts: bytes) -> str:
    """One short key for all of this."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "big") + part)
    return state.hexdigest()[:16]


def source_key() -> str:
    """A key that changes with any of the sources."""
    parts = [(str(f.relative_to(ROOT)).encode(), f.read_bytes()) for f in source_files()]
    return digest(*(part for pair in parts for part in pair))


@contextmanager
def staged_sources() -> Iterator[Path]:
    """A copy of the sources to build in, because a build leaves files among them."""
    with tempfile.TemporaryDirectory(prefix="nbd-build-") as name:
        folder = Path(name)
        for file in source_files():
            target = folder / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        yield folder


def is_current(folder: Path, what: str, key: str) -> bool:
    """Whether an environment holds `what` as the key says."""
    stamp = folder / f"{what}.key"
    return stamp.is_file() and stamp.read_text() == key


def venv(folder: Path, base: str, requirements: str) -> None:
    """Make an environment with what a file of tools/requirements lists, unless it is there."""
    wanted = REQUIREMENTS / f"{requirements}.txt"
    key = digest(output([base, "-VV"], f"{base} does not run").encode(), wanted.read_bytes())
    with locked(folder):
        if is_current(folder, "requirements", key):
            return
        say(f"{folder.name}: making the environment")
        log = new_log(f"environment-{folder.name}")
        hint = "Debian: apt install python3-venv pypy3-venv"
        make = [base, "-m", "venv", "--clear", folder]
        must(log, make, f"{base} cannot make environments: {hint}")
        install = [folder / "bin" / "python", "-m", "pip", "install", *QUIET, "-r", wanted]
        must(log, install, f"pip cannot install what {wanted.name} lists; it needs a package index")
        if requirements == FREE_THREADED:
            import freethreaded

            freethreaded.install_cffi(folder)
        (folder / "requirements.key").write_text(key)


def tools(name: str) -> Path:
    """The folder of programs of an environment that holds tools."""
    folder = CACHE / "environments" / name
    venv(folder, os.environ["NBD_PYTHON"], name)
    return folder / "bin"


def ready(environment: Environment) -> None:
    """Bring an environment, and the package in it, up to date."""
    base = base_interpreter(environment.interpreter)
    venv(environment.folder, base, environment.requirements)
    if environment.mode == "wheel":
        install_wheel(environment)
        return
    version = output(
        ["pkg-config", "--modversion", "libnbd"],
        "libnbd is missing (Debian: apt install libnbd-dev)",
    )
    requirements = (environment.folder / "requirements.key").read_text()
    key = digest(source_key().encode(), version.encode(), requirements.encode())
    if is_current(environment.folder, "package", key):
        return
    say(f"{environment.name}: building the package")
    log = new_log(f"package-{environment.name}")
    options = ("--no-deps", "--no-build-isolation", "--force-reinstall")
    with staged_sources() as folder:
        install = [environment.python, "-m", "pip", "install", "--no-input", *options, folder]
        environ = clean_environment(NBD_CFFI_MODE=environment.mode)
        must(log, install, f"the package does not build for {environment.name}", environ=environ)
    loaded = output(
        [environment.python, "-c", "import nbd._binding.build as build; print(build.MODE)"],
        f"the package of {environment.name} cannot be imported",
    )
    if loaded.lower() != environment.mode:
        raise Failure(f"{environment.name} was built in {loaded} mode")
    (environment.folder / "package.key").write_text(key)


def install_wheel(environment: Environment) -> None:
    """Install the wheel that NBD_WHEEL names."""
    log = new_log(f"package-{environment.name}")
    options = ("--no-deps", "--no-index", "--no-input", "--force-reinstall")
    install = [environment.python, "-m", "pip", "install", *options, os.environ["NBD_WHEEL"]]
    must(log, install, f"the wheel cannot be installed for {environment.name}")
