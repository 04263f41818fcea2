"""A failed build or import says in words what happened, and what to type."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from support.servers import TIMEOUT

import nbd
from nbd._binding.build import BUNDLED

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = Path(nbd.__file__).resolve().parent.parent
OURS = ("nbd", "nbdsh.py", "libnbd_cffi.py", *(["libnbd_cffi.libs"] if BUNDLED else []))

Failing = Callable[..., str]


def run(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the Python under test with some environment variables changed."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
    )


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    """Return a function that runs Python, which must fail, and returns its message."""

    def fail(*arguments: object, **variables: str) -> str:
        done = run(*arguments, cwd=tmp_path, **variables)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    return fail


@pytest.fixture
def build(failing: Failing, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs the build script, which must fail, and returns its message."""
    script = CHECKOUT / "build_nbd.py"

    def fail(**variables: str) -> str:
        message = failing(script, tmp_path / "out", **variables)
        assert "Traceback" not in message
        return message

    return fail


@pytest.fixture
def only(tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a PATH with only the given programs."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def link(*names: str) -> str:
        for name in names:
            found = shutil.which(name)
            if found is None:
                pytest.skip(f"{name} is not installed (Debian package: {name})")
            (folder / name).symlink_to(found)
        return str(folder)

    return link


def test_a_build_without_a_compiler_says_how_to_get_one(
    build: Failing, only: Callable[..., str]
) -> None:
    message = build(PATH=only("pkg-config"), CC="")
    assert "cc was not found" in message
    assert "apt install gcc libc6-dev" in message
    assert "dnf install gcc" in message


def test_a_build_without_pkg_config_says_how_to_get_it(
    build: Failing, only: Callable[..., str]
) -> None:
    message = build(PATH=only(), PKG_CONFIG="pkg-config")
    assert "pkg-config was not found" in message
    assert "apt install pkg-config" in message
    assert "dnf install pkgconf-pkg-config" in message


def test_a_build_without_libnbd_says_how_to_get_it(build: Failing, tmp_path: Path) -> None:
    message = build(PKG_CONFIG_LIBDIR=str(tmp_path), PKG_CONFIG_PATH="")
    assert "apt install libnbd-dev" in message
    assert "dnf install libnbd-devel" in message


def test_a_build_with_libnbd_pc_but_no_header_says_which_is_missing(
    build: Failing, tmp_path: Path
) -> None:
    lines = (f"includedir={tmp_path}", "Name: libnbd", "Description: none", "Version: 1.14.0")
    (tmp_path / "libnbd.pc").write_text("\n".join(lines) + "\n")
    message = build(PKG_CONFIG_LIBDIR=str(tmp_path), PKG_CONFIG_PATH="")
    assert f"{tmp_path}/libnbd.h is missing" in message
    assert "apt install libnbd-dev" in message


def test_a_build_in_an_unknown_mode_says_which_there_are(build: Failing) -> None:
    message = build(NBD_CFFI_MODE="fast")
    assert "'fast'" in message
    assert "api or abi" in message


def test_what_pip_shows_of_a_failed_build_has_the_reason(failing: Failing, tmp_path: Path) -> None:
    # pip runs setup.py, and shows its output.
    variables = {"PKG_CONFIG_LIBDIR": str(tmp_path), "PKG_CONFIG_PATH": ""}
    message = failing(CHECKOUT / "setup.py", "--version", **variables)
    assert "libnbd-cffi cannot be built: " in message
    assert "apt install libnbd-dev" in message
    assert "Traceback" not in message


@pytest.fixture
def old_libnbd(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that makes a folder with a nearly empty libnbd.so.0."""
    if BUNDLED:
        pytest.skip("libnbd came with the package, which uses no other")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed (Debian package: gcc)")
    folder = tmp_path / "old"
    folder.mkdir()
    source = folder / "old.c"
    source.write_text("void *nbd_create (void); void *nbd_create (void) { return 0; }\n")

    def make(versions: str) -> str:
        script = folder / "versions"
        script.write_text(versions)
        options = ["-shared", "-fPIC", "-Wl,-soname,libnbd.so.0", f"-Wl,--version-script={script}"]
        target = folder / "libnbd.so.0"
        subprocess.run([compiler, *options, str(source), "-o", str(target)], check=True)
        return str(folder)

    return make


@pytest.mark.parametrize(
    "versions",
    ["{ global: nbd_create; };", "LIBNBD_1.0 { global: nbd_create; };"],
    ids=["without a function", "without a version of the interface"],
)
def test_a_libnbd_older_than_the_one_built_with_is_named(
    failing: Failing, old_libnbd: Callable[[str], str], versions: str
) -> None:
    message = failing("-c", "import nbd", LD_LIBRARY_PATH=old_libnbd(versions))
    last = message.splitlines()[-1]
    built_with = nbd.__version__.split("-")[0]
    assert last.startswith(f"ImportError: nbd was built against libnbd {built_with}")
    assert "libnbd.so.0" in last or "undefined symbol: nbd_" in last
    assert f"Install libnbd {built_with} or newer" in last
    assert "apt install libnbd0" in last
    assert "pip install --force-reinstall --no-binary libnbd-cffi libnbd-cffi" in last


def test_the_shell_says_it_in_a_line(failing: Failing, old_libnbd: Callable[[str], str]) -> None:
    folder = old_libnbd("{ global: nbd_create; };")
    message = failing("-m", "libnbd_cffi", "--version", LD_LIBRARY_PATH=folder)
    assert message.startswith("nbdsh: nbd was built against libnbd ")
    assert len(message.splitlines()) == 1


@pytest.mark.skipif(not BUNDLED, reason="libnbd did not come with the package")
def test_a_libnbd_of_the_package_that_is_missing_is_named(failing: Failing, site: Path) -> None:
    for file in (site / "libnbd_cffi.libs").glob("libnbd-*"):
        file.unlink()
    last = failing("-c", "import nbd", PYTHONPATH=str(site)).splitlines()[-1]
    assert last.startswith("ImportError: nbd cannot load the libnbd ")
    assert "Install the wheel again (pip install --force-reinstall FILE)" in last


@pytest.mark.skipif(platform.python_implementation() == "PyPy", reason="PyPy contains cffi")
def test_a_missing_cffi_is_reported(failing: Failing) -> None:
    code = "import sys; sys.modules['_cffi_backend'] = None; import nbd"
    last = failing("-c", code).splitlines()[-1]
    assert last.startswith("ImportError: nbd needs cffi: ")
    assert last.endswith("Type: pip install cffi")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a copy of the installed package that tests may damage."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in OURS:
        source, target = INSTALLED / name, folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return folder


def test_the_unrelated_package_nbd_installed_over_ours_is_named(
    failing: Failing, site: Path
) -> None:
    (site / "nbd" / "__init__.py").write_text('"""A tool for notebooks."""\n')
    message = failing("-m", "libnbd_cffi", PYTHONPATH=str(site))
    assert f"{site}/nbd/__init__.py belongs to PyPI's unrelated package nbd" in message
    assert "pip uninstall nbd; pip install --force-reinstall --no-deps libnbd-cffi" in message
    assert len(message.splitlines()) == 1


def test_what_uninstalling_the_unrelated_package_took_away_is_named(
    failing: Failing, site: Path
) -> None:
    (site / "nbd" / "__init__.py").unlink()
    # Without this environment's site-packages, in which Python would find our package.
    variables = {"PYTHONPATH": str(site), "HIDDEN": str(INSTALLED)}
    code = (
        "import os, sys, _cffi_backend; hidden = os.environ['HIDDEN']; "
        "sys.path[:] = [p for p in sys.path if os.path.realpath(p) != hidden]; "
        "import libnbd_cffi; libnbd_cffi.main()"
    )
    message = failing("-c", code, **variables)
    assert f"a part of libnbd-cffi is missing in {site}/nbd" in message
    assert "pip install --force-reinstall --no-deps libnbd-cffi" in message


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Return a folder with modules like libnbd's own: nbd.py and nbdsh.py."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "nbd.py").write_text("class NBD:\n    pass\n")
    (folder / "nbdsh.py").write_text("def shell():\n    pass\n")
    return folder


def test_libnbds_own_module_before_ours_is_named(
    failing: Failing, site: Path, theirs: Path
) -> None:
    message = failing("-m", "libnbd_cffi", PYTHONPATH=f"{theirs}{os.pathsep}{site}")
    assert f"Python finds another nbd, {theirs}/nbd.py, before libnbd-cffi's" in message
    assert f"Remove {theirs} from PYTHONPATH" in message


def test_libnbds_own_module_behind_ours_changes_nothing(
    tmp_path: Path, site: Path, theirs: Path
) -> None:
    path = f"{site}{os.pathsep}{theirs}"
    done = run("-m", "libnbd_cffi", "--version", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "libnbd-cffi" in done.stdout


def test_libnbds_own_module_in_the_systems_site_packages_changes_nothing(tmp_path: Path) -> None:
    """With --system-site-packages, the environment's modules come before the system's."""
    environment = tmp_path / "environment"
    options = ("--system-site-packages", "--without-pip")
    assert run("-m", "venv", *options, environment, cwd=tmp_path).returncode == 0
    python = environment / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    made = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    target = Path(made.stdout.strip())
    for source in INSTALLED.iterdir():  # our package, and the requirements of a build
        if not (target / source.name).exists():
            (target / source.name).symlink_to(source)
    code = "import nbd; print(nbd.__file__); print(hasattr(nbd, 'Buffer'))"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(target / "nbd" / "__init__.py"), "True"], done.stderr
