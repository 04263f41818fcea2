# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run lint: the linters, the type checkers, and two compilers with warnings as errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from console import CACHE, ROOT, clean_environment, logged, must, new_log, output, run, say
from environments import Environment, ready, tools

GENERATED = CACHE / "generated-abi"

WARNINGS = ("-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O2", "-fsyntax-only")


class Step(NamedTuple):
    """The command of one linter, and where mypy searches for modules."""

    name: str
    command: Sequence[object]
    search: Sequence[Path] = ()


def c_files(pattern: str) -> list[Path]:
    """The C files that are not generated."""
    return [f for name in ("csrc", "tests/c", "benchmarks") for f in (ROOT / name).glob(pattern)]


def typed_copy(python: Path) -> Path:
    """Copy the package and add the generated modules, so that mypy sees all of nbd."""
    generate = [python, ROOT / "build_nbd.py", GENERATED]
    environ = clean_environment(NBD_CFFI_MODE="abi")
    must(new_log("generate"), generate, "build_nbd.py failed", environ=environ)
    folder = CACHE / "typed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("nbd", "generator"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for module in GENERATED.glob("*.py"):
        if module.name != "abi.py":
            shutil.copy(module, folder / "nbd" / "_binding")
    return folder


def python_steps(bin_folder: Path) -> Iterator[Step]:
    """The linters of the Python code, including what is generated."""
    typed = typed_copy(bin_folder / "python")
    ruff = bin_folder / "ruff"
    yield Step("ruff check", [ruff, "check", ROOT])
    yield Step("ruff format", [ruff, "format", "--check", ROOT])
    config = ["--config", ROOT / "pyproject.toml"]
    generated = sorted(one for one in GENERATED.glob("*.py") if one.name != "abi.py")
    yield Step("ruff check, generated modules", [ruff, "check", *config, *generated])
    yield Step("ruff format, generated modules", [ruff, "format", "--check", *config, *generated])
    mypy = [bin_folder / "mypy", "--strict", "--config-file", ROOT / "setup.cfg"]
    modules = [typed / "nbd", typed / "generator", *sorted(typed.glob("*.py"))]
    yield Step("mypy --strict nbd generator setup.py ...", [*mypy, *modules], [typed])
    for name in ("tools", "packaging", "benchmarks", "tests"):
        files = sorted(f for f in (ROOT / name).rglob("*.py") if f.parent.name != "c")
        search = [typed, ROOT / name] + ([ROOT / "tools"] if name == "packaging" else [])
        if files:
            yield Step(f"mypy --strict {name}", [*mypy, *files], search)
    for example in sorted((ROOT / "examples").glob("*.py")):
        yield Step(f"mypy --strict examples/{example.name}", [*mypy, example], [typed])
    yield stubtest(bin_folder)


def stubtest(bin_folder: Path) -> Step:
    """Compare the annotations that mypy reads with the package that runs."""
    environment = Environment("cpython", "abi")
    ready(environment)
    (site,) = environment.folder.glob("lib/python3*/site-packages")
    allowed = ["--allowlist", ROOT / "tools" / "stubtest-allowlist"]
    command = [bin_folder / "stubtest", "--mypy-config-file", ROOT / "setup.cfg", *allowed, "nbd"]
    return Step("stubtest nbd", ["env", f"PYTHONPATH={site}", *command], [site])


def c_steps(bin_folder: Path) -> Iterator[Step]:
    """The linters and compilers of the C code, including what is generated."""
    every = [*c_files("*.c"), *c_files("*.h")]
    shim = [*(ROOT / "csrc").glob("*.c"), GENERATED / "nbdglue.c"]
    options = [f"-I{folder}" for folder in (ROOT / "csrc", GENERATED)]
    options.append("-DNBDSHIM_BUNDLED")  # includes the code that only bundled wheels have
    library = output(["pkg-config", "--cflags", "libnbd"], "libnbd is missing").split()
    yield Step("clang-format", [bin_folder / "clang-format", "--dry-run", "--Werror", *every])
    checks = ["--enable=warning,style,performance,portability", "--error-exitcode=1", "--quiet"]
    quiet = ["--inline-suppr", "--suppress=missingIncludeSystem", "--std=c11"]
    yield Step("cppcheck", ["cppcheck", *checks, *quiet, *options, *shim])
    for compiler in ("gcc", "clang"):
        command = [compiler, *WARNINGS, *options, *library, *shim]
        yield Step(f"{compiler} -Wall -Wextra -Werror", command)


def shell_steps() -> Iterator[Step]:
    """The linter of the shell scripts."""
    scripts = [ROOT / "run", ROOT / "tests" / "c" / "run", ROOT / "packaging" / "libraries.sh"]
    scripts += sorted((ROOT / ".ci").glob("*"))
    yield Step("shellcheck", ["shellcheck", *scripts])


def is_clean(step: Step) -> bool:
    """Run a linter, and print its findings and its outcome."""
    log = new_log("lint")
    paths = os.pathsep.join(map(str, step.search))
    environ = clean_environment(MYPYPATH=paths, MYPY_CACHE_DIR=str(CACHE / "mypy"))
    clean = logged(log, step.command, environ=environ, cwd=ROOT) == 0
    if not clean:
        say("\n".join(log.read_text(errors="replace").splitlines()[1:]))
        log.rename(log.with_stem(f"lint-{step.name.split()[0]}"))
    say(f"{step.name}: {'clean' if clean else 'NOT clean'}")
    return clean


def main(arguments: list[str]) -> int:
    """Run every linter; returns 1 if one of them found something."""
    programs = tools("lint")
    steps = [*python_steps(programs), *c_steps(programs), *shell_steps()]
    results = [is_clean(step) for step in steps]
    say(f"{sum(results)} passed, {results.count(False)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    run(main)
