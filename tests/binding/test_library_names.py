"""Every name that the package uses of the C library exists there, in this mode of cffi.

A missing name raises AttributeError only where it is used, which may be code that no test reaches:
the message for an argument that was refused, for example.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nbd
from nbd._binding.shim import MODE, ffi, lib, process

PACKAGE = Path(nbd.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "abi")
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]
#: The methods of ffi whose first argument names a C type.
NAMING = ("alignof", "callback", "cast", "getctype", "new", "offsetof", "sizeof", "typeof")

every_module = pytest.mark.parametrize("path", MODULES, ids=IDS)


def tree(path: Path) -> ast.AST:
    """Return the syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf-8"))


def is_named(node: ast.expr, name: str) -> bool:
    """Return whether an expression is a name, or an attribute with that name: shim.lib."""
    if isinstance(node, ast.Attribute):
        return node.attr == name
    return isinstance(node, ast.Name) and node.id == name


def taken(module: ast.AST, of: str) -> Iterator[str]:
    """Yield the attributes of `lib` or `ffi` that a module uses."""
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and is_named(node.value, of):
            yield node.attr
        elif isinstance(node, ast.Call) and any(is_named(one, of) for one in node.args[:1]):
            yield from looked_up(node)


def looked_up(call: ast.Call) -> Iterator[str]:
    """Yield the names that getattr(lib, name), hasattr or ffi.addressof may look up."""
    function = call.func
    asked = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    if asked not in ("getattr", "addressof") or len(call.args) != 2:
        return  # with a third argument, getattr accepts a missing name
    name = call.args[1]
    if isinstance(name, ast.Constant):
        yield str(name.value)
    elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
        prefix = str(name.values[0].value)
        assert prefix == "nbdup_", f"say here which names follow {prefix!r}"
        if MODE == "API":
            yield from (f"{prefix}{upcall}" for upcall in process.upcalls)
    else:
        pytest.fail(f"line {call.lineno}: say here which names it asks for")


def types(module: ast.AST) -> Iterator[str]:
    """Yield the C types that a module names."""
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and is_named(node.func.value, "ffi")
            and node.func.attr in NAMING
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def missing(module: ast.AST) -> list[str]:
    """Return the names that a module uses of the library and that the library lacks."""
    return sorted({name for name in taken(module, "lib") if not hasattr(lib, name)})


def unknown(module: ast.AST) -> list[str]:
    """Return the C types that a module names and that cffi does not know."""
    found = []
    for name in sorted(set(types(module))):
        try:
            ffi.typeof(name)
        except ffi.error as reason:
            found.append(f"{name}: {reason}")
    return found


@every_module
def test_every_name_of_the_library_exists(path: Path) -> None:
    assert missing(tree(path)) == []


@every_module
def test_every_name_of_cffi_exists(path: Path) -> None:
    assert sorted({name for name in taken(tree(path), "ffi") if not hasattr(ffi, name)}) == []


@every_module
def test_every_type_that_is_named_is_known(path: Path) -> None:
    assert unknown(tree(path)) == []


@every_module
def test_the_library_has_no_other_name(path: Path) -> None:
    renamed = [
        alias.asname
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in ("lib", "ffi") and alias.asname is not None
    ]
    assert renamed == []


def test_a_name_that_does_not_exist_is_found() -> None:
    module = ast.parse(
        "lib.nbdqueue_wait, shim.lib.NBDQUEUE_NO_SUCH, getattr(lib, 'nbdqueue_gone')\n"
        "ffi.new('struct nbdqueue_done[]', 3), ffi.typeof('struct nbd no type')\n"
    )
    assert missing(module) == ["NBDQUEUE_NO_SUCH", "nbdqueue_gone"]
    assert [one.partition(":")[0] for one in unknown(module)] == ["struct nbd no type"]


def test_the_names_were_found() -> None:
    modules = [tree(path) for path in MODULES]
    assert len({name for module in modules for name in taken(module, "lib")}) > 100
    assert {"struct nbdqueue_done[]", "struct nbdshim_upcalls"} <= {
        name for module in modules for name in types(module)
    }
