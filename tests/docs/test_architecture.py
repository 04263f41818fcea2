# SPDX-License-Identifier: LGPL-2.0-or-later
"""ARCHITECTURE.md and the package: the names are true, and imports go one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkout import CHECKOUT

import nbd
from generator.calls import load_documentation
from generator.emit_glue_source import glue_source
from generator.emit_methods import methods_module
from generator.library import find_library
from generator.read import read

PAGE = (CHECKOUT / "ARCHITECTURE.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)
NAMES = [tuple(q.split(":")) for q in QUOTED if re.fullmatch(r"[\w./]+\.(py|c|h):[\w.]+", q)]
PATHS = [q for q in QUOTED if re.fullmatch(r"[\w.]+/[\w./]*", q)]
INSTALLED = Path(nbd.__file__).parent
SCREEN = 160  # lines, with the glossary
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# The layers, and in each what its modules may import of it: only those that stand before them.
LAYERS = {
    layer: re.findall(r"^    (\w+) {2,}", (CHECKOUT / f"nbd/{layer}/__init__.py").read_text(), re.M)
    for layer in ("_binding", "_disks")
}
LAYERS["aio"] = ["_threads", "_client", "_reconnect", "_connect", "_copy"]
LAYERS["fsspec"] = ["_url", "_options", "_exports", "_clients", "_filesystem"]
ORDER = [f"{layer}.{module}" for layer, modules in LAYERS.items() for module in modules]


def source(path: str) -> str:
    """Return the text of a file of the tree, or of one that is generated."""
    if path == "nbdglue.c":
        return glue_source(read(find_library().header))
    file = CHECKOUT / path
    if not file.exists() and path.startswith("nbd/"):
        file = INSTALLED.parent / path
    return file.read_text(encoding="utf-8")


def defined(text: str) -> Iterator[str]:
    """Yield what a Python module defines: functions, classes, their methods, and variables."""
    for node in ast.parse(text).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.ClassDef):
            members = [one for one in node.body if isinstance(one, FUNCTIONS)]
            yield from (f"{node.name}.{member.name}" for member in members)
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def imported(module: str) -> set[str]:
    """Return the modules of the layers that one of them imports when it is loaded."""
    tree = ast.parse(source(f"nbd/{module.replace('.', '/')}.py"))
    found = {
        name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    return {name[len("nbd.") :] for name in found if name.startswith("nbd.")}


@pytest.mark.parametrize(("path", "name"), NAMES, ids=[":".join(pair) for pair in NAMES])
def test_a_function_that_the_page_names_is_in_that_file(path: str, name: str) -> None:
    text = source(path)
    if path.endswith(".py"):
        assert name in set(defined(text))
    else:
        assert re.search(rf"^[a-z][\w \*]*\b{name}\([^;]*?\)\n{{", text, re.MULTILINE)


@pytest.mark.parametrize("path", PATHS)
def test_a_file_that_the_page_names_is_there(path: str) -> None:
    assert (CHECKOUT / path).exists()


def test_the_generated_code_on_the_page_is_what_the_generator_writes() -> None:
    header = read(find_library().header)
    quoted = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in quoted] == ["python", "c"]
    written = methods_module(header, load_documentation()), glue_source(header)
    assert [code in text for (_, code), text in zip(quoted, written)] == [True, True]


def test_the_page_names_enough_and_is_short() -> None:
    assert len(NAMES) >= 20
    assert len(PAGE.splitlines()) <= SCREEN


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_before_it(module: str) -> None:
    assert imported(module) <= set(ORDER[: ORDER.index(module)])


def test_the_order_of_imports_names_every_private_module() -> None:
    for layer, modules in LAYERS.items():
        written = {path.stem for path in (INSTALLED / layer).glob("*.py")} - {"__init__", "abi"}
        assert written == set(modules)


def test_an_import_loads_only_what_a_connection_and_a_read_need() -> None:
    program = (
        "import sys; before = {*sys.modules}; import nbd\n"
        "print(*sorted(m for m in {*sys.modules} - before if m.partition('.')[0] == 'nbd'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    found = {m for m in done.stdout.split() if not re.match(r"nbd\._binding\.(abi|api)", m)}
    needed = {f"nbd._binding.{module}" for module in LAYERS["_binding"]}
    if sys.implementation.name == "cpython":
        needed.remove("nbd._binding.pypy")
    assert found == {"nbd", "nbd._binding", *needed}


def test_the_source_says_in_one_line_that_it_is_not_built(tmp_path: Path) -> None:
    for path in (CHECKOUT / "nbd").rglob("*.py"):
        target = tmp_path / path.relative_to(CHECKOUT)
        if path.stem not in ("abi", "build", "constants", "methods", "upcalls"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-c", "import nbd"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: nbd in {tmp_path} is source code that is not built")
    assert f"Type: pip install {tmp_path}" in last
