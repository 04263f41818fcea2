"""From the model to text: the C glue and the Python modules that the generator writes."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import checkout  # noqa: F401 - makes generator importable

from generator.calls import Documentation, load_documentation
from generator.emit_build import build_module
from generator.emit_cdef import extern_python
from generator.emit_constants import constants_module
from generator.emit_glue_header import glue_header, prototype
from generator.emit_glue_source import glue_source
from generator.emit_methods import method, methods_module
from generator.emit_upcalls import upcalls_module
from generator.library import find_library
from generator.model import ORPHAN_PIN, Function, Header
from generator.read import RESERVED, RESERVED_IN_CALLBACKS, parse, read
from generator.text import split_arguments, wrap, wrap_c
from generator.waiting import stoppable

COLUMNS = 100
PRELUDE = """\
typedef struct { uint64_t a; uint64_t b; } nbd_pair;
typedef struct { int (*callback) (void *user_data, nbd_pair *pairs_of, size_t nr, int *error); }
  nbd_pairs_callback;
typedef struct { int (*callback) (void *user_data, int *error); } nbd_completion_callback;
"""
COMPLETION = ", nbd_completion_callback completion_callback"
INSTALLED = stoppable(read(find_library().header))
PYTHON = {
    "build.py": build_module("ABI", "1.14.0", bundled=False),
    "constants.py": constants_module(INSTALLED),
    "upcalls.py": upcalls_module(INSTALLED),
    "methods.py": methods_module(INSTALLED, load_documentation()),
}
MADE_BY = {
    "build.py": "emit_build.py",
    "constants.py": "emit_constants.py",
    "upcalls.py": "emit_upcalls.py",
    "methods.py": "emit_methods.py",
}


def header(declaration: str) -> Header:
    """Return the model of a function, in which H stands for the handle."""
    text = f"{PRELUDE}extern {declaration};".replace("(H", "(struct nbd_handle *h")
    return parse(text, "#define NBD_NULL_COMPLETION { 0 }")


def function(declaration: str) -> Function:
    """Return the model of the function alone."""
    (only,) = header(declaration).functions
    return only


def flat(declaration: str) -> str:
    """Return its flat declaration."""
    return " ".join(prototype(function(declaration)).split())


def python(declaration: str, entry: Documentation | None = None) -> ast.FunctionDef:
    """Return its method."""
    found = header(declaration)
    (only,) = ast.parse(textwrap.dedent(method(found.functions[0], found, entry))).body
    assert isinstance(only, ast.FunctionDef)
    return only


def signature(declaration: str) -> str:
    """Return the parameters of its method, without types."""
    arguments = python(declaration).args
    for argument in arguments.args:
        argument.annotation = None
    return ast.unparse(arguments)


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("int nbd_f (H)", "int nbdcall_f(struct nbdshim *s)"),
        ("bool nbd_f (H, bool b)", "int nbdcall_f(struct nbdshim *s, bool b)"),
        ("uint32_t nbd_f (H)", "int64_t nbdcall_f(struct nbdshim *s)"),
        ("unsigned nbd_f (H)", "int64_t nbdcall_f(struct nbdshim *s)"),
        ("char *nbd_f (H)", "char *nbdcall_f(struct nbdshim *s)"),
        (
            "int nbd_f (H, const void *buf, size_t count)",
            "int nbdcall_f(struct nbdshim *s, const void *buf, size_t count)",
        ),
        (
            "int nbd_f (H, const struct sockaddr *addr, socklen_t addrlen)",
            "int nbdcall_f(struct nbdshim *s, const void *addr, uint32_t addrlen)",
        ),
        (
            "int nbd_f (H, nbd_pairs_callback pairs_callback)",
            "int nbdcall_f(struct nbdshim *s, uintptr_t pairs)",
        ),
        (
            f"int64_t nbd_f (H{COMPLETION}, uint32_t flags)",
            "int64_t nbdcall_f(struct nbdshim *s, uintptr_t completion, bool has_completion, "
            "uint32_t flags)",
        ),
    ],
)
def test_a_flat_function_takes_integers_and_pointers(declaration: str, expected: str) -> None:
    assert flat(declaration) == expected


@pytest.mark.parametrize(
    ("returns", "refused"),
    [
        ("int ", "refused"),
        ("int64_t ", "refused"),
        ("uint32_t ", "refused"),
        ("uint64_t ", "0"),
        ("uintptr_t ", "0"),
        ("char *", "NULL"),
        ("const char *", "NULL"),
    ],
)
def test_a_refusal_is_distinguished_from_a_result(returns: str, refused: str) -> None:
    source = glue_source(header(f"{returns}nbd_f (H)"))
    assert f"if (refused)\n        return {refused};" in source


def test_an_array_of_structs_is_checked_at_compile_time() -> None:
    source = glue_source(header("int nbd_f (H)"))
    assert "_Static_assert(sizeof(nbd_pair) == 2 * sizeof(uint64_t)" in source


def test_the_upcalls_are_the_same_in_both_modes() -> None:
    found = header("int nbd_f (H)")
    declared = re.findall(r"int \(\*(\w+)\)\(([^)]*)\);", " ".join(glue_header(found).split()))
    external = re.findall(r"int nbdup_(\w+)\(([^)]*)\);", extern_python(found))
    assert [name for name, _ in declared] == [
        "release",
        "interrupted",
        "orphaned",
        "pairs",
        "completion",
    ]
    assert declared == external


@pytest.mark.parametrize("text", [glue_header(INSTALLED), glue_source(INSTALLED)], ids=["h", "c"])
def test_c_fits_its_columns(text: str) -> None:
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []


def test_a_long_declaration_is_lined_up() -> None:
    arguments = [f"uint64_t parameter_number_{n}" for n in range(8)]
    lines = wrap_c(f"int f({', '.join(arguments)});").splitlines()
    assert len(lines) > 1
    assert all(len(line) <= COLUMNS for line in lines)
    assert all(re.match(r" {6}\w", line) for line in lines[1:])


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("int nbd_f (H)", "self"),
        ("int nbd_f (H, uint64_t offset, uint32_t flags)", "self, offset, flags=0"),
        ("int nbd_set_f (H, uint32_t flags)", "self, flags"),
        ("int nbd_f (H, void *buf, size_t count)", "self, count"),
        ("int64_t nbd_aio_f (H, void *buf, size_t count)", "self, buf"),
        ("int nbd_f (H, const void *buf, size_t count)", "self, buf"),
        ("int nbd_f (H, const struct sockaddr *addr, socklen_t addrlen)", "self, addr"),
        ("int nbd_f (H, nbd_pairs_callback pairs_callback)", "self, pairs"),
        (f"int nbd_f (H{COMPLETION}, uint32_t flags)", "self, completion=None, flags=0"),
    ],
)
def test_a_method_has_the_parameters_of_libnbds_module(declaration: str, expected: str) -> None:
    assert signature(declaration) == expected


def test_an_unknown_callback_type_is_any_callable() -> None:
    arguments = python(f"int nbd_f (H, nbd_pairs_callback pairs_callback{COMPLETION})").args.args
    annotations = [ast.unparse(a.annotation) for a in arguments if a.annotation]
    assert annotations == ["Callable[..., object]", "CompletionCallback | None"]


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("int nbd_f (H)", "None"),
        ("int nbd_is_f (H)", "bool"),
        ("int64_t nbd_f (H)", "int"),
        ("char *nbd_f (H)", "str"),
        ("int nbd_f (H, void *buf, size_t count)", "bytearray"),
    ],
)
def test_a_method_says_what_it_returns(declaration: str, expected: str) -> None:
    returns = python(declaration).returns
    assert returns is not None
    assert ast.unparse(returns) == expected


def test_a_docstring_is_the_entry_and_the_call() -> None:
    entry = Documentation("Weather", "1.26", "Say that it rains.\n\nIt does.")
    text = ast.get_docstring(python("int nbd_rain (H)", entry))
    assert text == "Say that it rains.\n\nIt does.\n\nC: nbd_rain, since libnbd 1.26."


def test_a_docstring_may_have_backslashes() -> None:
    entry = Documentation("Weather", "1.26", r"Say that \x00 is no rain.")
    text = ast.get_docstring(python("int nbd_rain (H)", entry))
    assert text is not None
    assert text.startswith(r"Say that \x00 is no rain.")


def test_a_call_without_entry_names_its_manual_page() -> None:
    text = ast.get_docstring(python("int nbd_rain (H)"))
    assert text is not None
    assert "nbd_rain(3)" in text
    assert text.endswith("C: nbd_rain.")


def test_constants_have_their_values_in_c() -> None:
    namespace: dict[str, object] = {}
    exec(constants_module(parse("", '#define LIBNBD_A 0x1fU\n#define LIBNBD_B "b:"')), namespace)
    assert namespace["__all__"] == ["A", "B"]
    assert (namespace["A"], namespace["B"]) == (31, "b:")


@pytest.mark.parametrize("name", PYTHON)
def test_a_module_compiles_and_says_what_made_it(name: str) -> None:
    compile(PYTHON[name], name, "exec")
    second = PYTHON[name].splitlines()[1]
    maker = f"generator/{MADE_BY[name]}"
    assert second == f"# Made from libnbd.h by {maker}: change that, not this."
    assert ast.get_docstring(ast.parse(PYTHON[name]))


@pytest.mark.parametrize("name", PYTHON)
def test_a_module_fits_its_columns(name: str) -> None:
    assert [line for line in PYTHON[name].splitlines() if len(line) > COLUMNS] == []


@pytest.mark.parametrize("name", PYTHON)
def test_a_module_is_formatted(name: str, tmp_path: Path) -> None:
    tool = shutil.which("ruff", path=os.path.dirname(sys.executable)) or shutil.which("ruff")
    if tool is None:
        pytest.skip("ruff is not installed (pip install ruff)")
    (tmp_path / name).write_text(PYTHON[name], encoding="utf-8")
    command = [tool, "format", "--isolated", f"--line-length={COLUMNS}", "--diff", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def foreign_names(module: str) -> Iterator[str]:
    """Yield the names used in a module's functions that are not derived from parameter names.

    No parameter of libnbd can be called `_` or `int`, begin with nbdcall_, or have the buffer's
    name twice.
    """
    impossible = {"_", "int", "buf"}
    for node in ast.walk(ast.parse(module)):
        if not isinstance(node, ast.FunctionDef) or node.name == "release":
            continue
        own = {argument.arg for argument in node.args.args}
        made = ("nbdcall_", *(f"{name}_" for name in own), *(f"_{name}_" for name in own))
        body = ast.Module(node.body, [])
        used = {n.id for n in ast.walk(body) if isinstance(n, ast.Name)} - own - impossible
        yield from (name for name in used if not name.startswith(made))


def test_no_parameter_can_hide_a_name_that_a_method_uses() -> None:
    assert set(foreign_names(PYTHON["methods.py"])) - RESERVED == set()


def test_no_argument_can_hide_a_name_that_a_callback_uses() -> None:
    assert set(foreign_names(PYTHON["upcalls.py"])) - RESERVED_IN_CALLBACKS == set()


def test_the_upcall_for_a_stopped_call_takes_the_variable_that_has_its_pin() -> None:
    alone = {f.name for f in INSTALLED.functions if f.has_buffer_alone}
    assigned = {}
    for node in ast.walk(ast.parse(PYTHON["methods.py"])):
        if isinstance(node, ast.FunctionDef):
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == ORPHAN_PIN]
            assigned[node.name] = any(isinstance(name.ctx, ast.Store) for name in names)
    assert {name for name, is_assigned in assigned.items() if is_assigned} == alone
    assert {"pread", "pread_into", "pwrite"} <= alone
    assert f'registry[token] = _getframe(1).f_locals["{ORPHAN_PIN}"]' in PYTHON["upcalls.py"]


def test_every_function_is_in_every_text_once() -> None:
    names = {f.name for f in INSTALLED.functions}
    methods = re.findall(r"^    def (\w+)\(", PYTHON["methods.py"], re.MULTILINE)
    declared = re.findall(r"nbdcall_(\w+)\(", glue_header(INSTALLED))
    defined = re.findall(r"nbdcall_(\w+)\(.*?\)\n{", glue_source(INSTALLED), re.DOTALL)
    assert sorted(methods) == sorted(declared) == sorted(defined) == sorted(names)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a, b=f(1, 2), c: X[int, str]", ["a", "b=f(1, 2)", "c: X[int, str]"]),
    ],
)
def test_arguments_are_split_outside_brackets(text: str, parts: list[str]) -> None:
    assert split_arguments(text) == parts


def test_a_long_call_has_an_argument_a_line() -> None:
    names = [f"argument_number_{n}" for n in range(9)]
    text = wrap(f"call({', '.join(names)})", 0)
    assert text == inspect.cleandoc("call(\n" + "".join(f"    {name},\n" for name in names) + ")")
    assert wrap("call(a, b)", 0) == "call(a, b)"
