"""The installed package is complete and has correct metadata, and uninstalling removes all."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Callable

import pytest

import nbd
from nbd._binding.build import MODE

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = Path(nbd.__file__).resolve().parent.parent
SOURCES = (
    *("build_nbd.py", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"),
    *("nbdsh.py", "libnbd_cffi.py", "csrc", "generator", "nbd"),
)
OURS = re.compile(r"nbd|libnbd[_-]cffi|__editable__.*libnbd")
ENOUGH = 600  # seconds: PyPy compiles under load

# The files that a build makes in the source folder; .gitignore names all of them.
MADE_IN_PLACE = re.compile(
    r"build|libnbd_cffi\.egg-info|__pycache__"
    r"|nbd/(_binding/|_disks/|aio/|shell/)?__pycache__"
    r"|nbd/_binding/((abi|build|constants|methods|upcalls)\.py|[^/]+\.so)"
)

Pip = Callable[..., str]
SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")


def test_the_metadata_describes_the_package() -> None:
    metadata = distribution("libnbd-cffi").metadata
    assert metadata["License-Expression"] == "LGPL-2.0-or-later"
    assert metadata["Requires-Python"] == ">=3.9"
    assert metadata.get_all("Project-URL")
    assert "LICENSE" in (metadata.get_all("License-File") or [])


def test_the_classifiers_name_this_interpreter() -> None:
    classifiers = distribution("libnbd-cffi").metadata.get_all("Classifier") or []
    assert f"Programming Language :: Python :: 3.{sys.version_info.minor}" in classifiers
    kind = platform.python_implementation()
    assert f"Programming Language :: Python :: Implementation :: {kind}" in classifiers


def test_only_cffi_is_required_except_on_pypy_which_contains_it() -> None:
    cffi, fsspec = distribution("libnbd-cffi").requires or []
    assert re.match(r"cffi>=[\d.]+; platform_python_implementation != \"PyPy\"", cffi)
    assert re.match(r"fsspec>=[\d.]+; extra == .fsspec.", fsspec)


def test_the_command_is_installed() -> None:
    points = distribution("libnbd-cffi").entry_points
    assert [one.name for one in points if one.group == "console_scripts"] == ["nbdsh"]
    assert Path(sys.executable).with_name("nbdsh").exists()


def test_fsspec_finds_the_file_system_by_each_scheme() -> None:
    points = distribution("libnbd-cffi").entry_points
    found = {one.name: one.value for one in points if one.group == "fsspec.specs"}
    assert found == dict.fromkeys(SCHEMES, "nbd.fsspec:NBDFileSystem")


def test_the_package_is_marked_as_typed() -> None:
    assert (INSTALLED / "nbd" / "py.typed").exists()


def test_everything_installed_is_recorded_and_nothing_else_is_there() -> None:
    recorded = {str(path) for path in distribution("libnbd-cffi").files or []}
    there = [path for path in (INSTALLED / "nbd").rglob("*") if path.is_file()]
    found = {str(path.relative_to(INSTALLED)) for path in there if path.suffix != ".pyc"}
    assert found == {name for name in recorded if re.match(r"nbd/.*(?<!\.pyc)$", name)}


def test_abi_mode_installs_no_extension_module() -> None:
    extensions = {path.name for path in (INSTALLED / "nbd").rglob("*.so")}
    assert len(extensions) == 1
    assert ("nbdshim.so" in extensions) == (MODE == "ABI")


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Return the site-packages of a new environment with all that this one has, without nbd."""
    folder = tmp_path / "environment"
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    (site,) = folder.glob("lib/*/site-packages")
    for source in INSTALLED.iterdir():
        if not OURS.match(source.name):
            (site / source.name).symlink_to(source)
    return site


@pytest.fixture
def pip(environment: Path) -> Pip:
    """Return a function that runs pip in the new environment, without network."""
    python = environment.parents[2] / "bin" / "python"
    # The build is never run, so the compiler need not optimize.
    variables = {"NBD_CFFI_MODE": MODE.lower(), "CFLAGS": "-O0", "PIP_NO_INDEX": "1"}

    def run(*arguments: object) -> str:
        command = [str(python), "-m", "pip", *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=environment,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=ENOUGH,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of the sources in a checkout."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in SOURCES:
        original = CHECKOUT / name
        if original.is_dir():
            made = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(original, folder / name, ignore=made)
        else:
            shutil.copy(original, folder)
    return folder


def files(folder: Path) -> set[str]:
    """Return the paths below a folder, without following links."""
    return {
        os.path.relpath(os.path.join(where, name), folder)
        for where, folders, names in os.walk(folder)
        for name in (*folders, *names)
        if "__pycache__" not in where and name != "__pycache__"
    }


def test_installing_twice_and_uninstalling_leaves_nothing(
    pip: Pip, environment: Path, source: Path
) -> None:
    prefix = environment.parents[2]
    before = files(prefix)
    options = ("--no-deps", "--no-build-isolation", "--force-reinstall")
    pip("install", *options, source)
    installed = files(prefix)
    pip("install", *options, source)
    assert files(prefix) == installed
    pip("uninstall", "--yes", "libnbd-cffi")
    assert files(prefix) == before


def test_an_editable_install_works_and_leaves_nothing_but_what_it_built(
    pip: Pip, environment: Path, source: Path, tmp_path: Path
) -> None:
    prefix = environment.parents[2]
    before, sources = files(prefix), files(source)
    pip("install", "--no-deps", "--no-build-isolation", "--editable", source)
    code = "import nbd; print(nbd.__file__); print(nbd.NBD().get_version())"
    python = prefix / "bin" / "python"
    command = [str(python), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    ask = ["pkg-config", "--modversion", "libnbd"]  # the version it is built with
    version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    assert done.stdout.split() == [str(source / "nbd" / "__init__.py"), version], done.stderr
    pip("uninstall", "--yes", "libnbd-cffi")
    assert files(prefix) == before
    made = {name for name in files(source) - sources if not name.startswith(("build/", "libnbd_"))}
    assert [name for name in sorted(made) if not MADE_IN_PLACE.fullmatch(name)] == []
