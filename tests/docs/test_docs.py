"""The documentation in help() and README is complete and correct, and its examples work."""

from __future__ import annotations

import asyncio
import doctest
import gc
import importlib
import inspect
import io
import os
import pkgutil
import pydoc
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import hostile, servers
from support.docstring_figures import documentation, has_example, public_methods
from support.handles import NO_CALLS
from support.servers import StartServer

import nbd
import nbd.aio
import nbd.queue
import nbd.types

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"
ENTRIES = CHECKOUT / "generator" / "docs"

TIMEOUT = 30  # seconds until a test fails because an example does not end
LEAST = 200  # characters of a method's docstring
ROWS, COLUMNS = 24, 80

METHODS: dict[str, Callable[..., Any]] = dict(public_methods(nbd.NBD))
TEXTS = {name: documentation(method) for name, method in METHODS.items()}
OWN = (
    *("NBD", "Buffer", "Error", "Timeout", "DiskError", "ClosedHandle"),
    *("nbd", "connect", "copy", "extents", "open"),
)
SERVER = ["nbdkit", "-s", "--exit-with-parent", "memory", "size=1M"]

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)

# The names that a block of README may use without defining them.
PRELUDE = """\
import nbd
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri("nbd://localhost")
"""


def public_things() -> Iterator[tuple[str, object]]:
    """Yield the name and value of everything in nbd that can have a docstring."""
    yield "nbd", nbd
    for name in OWN:
        yield from with_members(f"nbd.{name}", getattr(nbd, name))
    for module in (nbd.aio, nbd.queue):
        yield module.__name__, module
        for name in module.__all__:
            yield from with_members(f"{module.__name__}.{name}", getattr(module, name))


def with_members(name: str, thing: object) -> Iterator[tuple[str, object]]:
    """Yield an object and, if it is a class, its public members."""
    yield name, thing
    if inspect.isclass(thing):
        for member, value in inspect.getmembers(thing):
            base = OSError if issubclass(thing, OSError) else Exception
            is_told_of_there = hasattr(base, member) or inspect.ismemberdescriptor(value)
            if not member.startswith("_") and not is_told_of_there:
                yield f"{name}.{member}", value


def modules() -> Iterator[Any]:
    """Yield the public modules of the package."""
    for module in pkgutil.iter_modules(nbd.__path__):
        if not module.name.startswith("_"):
            yield importlib.import_module(f"nbd.{module.name}")


def arguments(text: str) -> dict[str, str]:
    """Return the descriptions in a docstring's Args section, by name."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    if section is None:
        return {}
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}


def parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a method without self."""
    return list(inspect.signature(method).parameters.values())[1:]


def rendered(thing: object) -> list[str]:
    """Return the lines that help() shows on a terminal."""
    return pydoc.plain(pydoc.render_doc(thing)).rstrip("\n").splitlines()


def entries() -> dict[str, str]:
    """Return the generator's documentation for all versions of libnbd, by the call's name."""
    found: dict[str, str] = {}
    for path in ENTRIES.glob("*.txt"):
        parts = re.split(r"^== (\w+) \([\d.]+\)\n", path.read_text(encoding="utf-8"), flags=re.M)
        found.update(zip(parts[1::2], map(str.strip, parts[2::2])))
    return found


THINGS = dict(public_things())
EXAMPLES = {name: text for name in THINGS if has_example(text := documentation(THINGS[name]))}
BLOCKS = [match.groups() for match in BLOCK.finditer(README.read_text(encoding="utf-8"))]


def end_servers() -> None:
    """Kill the servers that an example started, which ends every wait for one."""
    for process, name in servers.children().items():
        if name in ("nbdkit", "qemu-nbd"):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture
def collected() -> Iterator[None]:
    """Close the objects that an example leaves open: PyPy needs a collection for that."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_in_docstring(name: str) -> None:
    servers.program("nbdkit")
    if "qemu-nbd" in EXAMPLES[name]:
        servers.program("qemu-nbd")
    with hostile.Watchdog(TIMEOUT, end_servers) as watchdog, nbd.NBD() as h:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        h.connect_command(SERVER)
        scope = {"asyncio": asyncio, "nbd": nbd, "h": h, "select": select}
        test = doctest.DocTestParser().get_doctest(EXAMPLES[name], scope, name, None, 0)
        report = io.StringIO()
        outcome = doctest.DocTestRunner(verbose=False).run(test, out=report.write)
    assert not watchdog.late, f"it hangs: {EXAMPLES[name]}"
    assert outcome.failed == 0, report.getvalue()


def run_program(text: str, uri: str, folder: Path) -> str:
    """Run a program with a server instead of localhost, and return its output."""
    program = folder / "program.py"
    program.write_text(text.replace('"nbd://localhost"', repr(uri)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        env={**os.environ, "LIBNBD_DEBUG": ""},
        cwd=folder,
        capture_output=True,
        check=False,
        encoding="utf-8",
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("block", "prints"), BLOCKS, ids=map(str, range(1, len(BLOCKS) + 1)))
def test_block_of_readme(
    block: str, prints: str | None, nbdkit: StartServer, tmp_path: Path
) -> None:
    if "qemu-nbd" in block:
        servers.program("qemu-nbd")
    printed = run_program(PRELUDE + block, nbdkit("memory", "1M").uri, tmp_path)
    assert prints is None or printed == prints


def test_quick_start_of_the_module(nbdkit: StartServer, tmp_path: Path) -> None:
    start = re.search(r"^Quick start:\n\n((?:    .*\n|\n)+)", documentation(nbd), re.MULTILINE)
    assert start
    assert 8 <= len(start[1].strip().splitlines()) <= 12
    program = inspect.cleandoc(start[1])
    assert run_program(program, nbdkit("memory", "1M").uri, tmp_path) == "1048576\n"


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name, thing in THINGS.items() if len(documentation(thing)) < 10] == []


def test_every_function_and_class_of_a_public_module_has_a_docstring() -> None:
    bare = []
    for module in modules():
        for name, thing in vars(module).items():
            is_own = getattr(thing, "__module__", None) == module.__name__
            if is_own and not name.startswith("_") and callable(thing) and not thing.__doc__:
                bare.append(f"{module.__name__}.{name}")
    assert bare == []


def test_every_public_module_has_a_docstring() -> None:
    assert [module.__name__ for module in modules() if not module.__doc__] == []


def test_every_method_says_enough() -> None:
    assert [name for name, text in TEXTS.items() if len(text) < LEAST] == []


def test_every_method_names_its_call_and_since_when() -> None:
    last = {name: text.splitlines()[-1] for name, text in TEXTS.items() if name not in NO_CALLS}
    last["aio_pread"] = last.pop("pread_into")
    pattern = r"C: nbd_{}, since libnbd \d+\.\d+\."
    assert [name for name in last if not re.fullmatch(pattern.format(name), last[name])] == []


def test_every_parameter_is_documented_in_its_order() -> None:
    for name, method in METHODS.items():
        wanted = [parameter.name for parameter in parameters(method)]
        assert list(arguments(TEXTS[name])) == wanted, name


def test_every_callback_is_documented_where_it_is_passed() -> None:
    for name, method in METHODS.items():
        said = arguments(TEXTS[name])
        for parameter in parameters(method):
            if "Callback" in str(parameter.annotation):
                called = rf"Called .*\b{parameter.name}\(\w"
                assert re.search(called, said[parameter.name]), name


def test_every_method_fits_the_width_of_a_terminal_in_the_help_of_its_class() -> None:
    width = COLUMNS - len(" |      ")
    assert [name for name in TEXTS if max(map(len, TEXTS[name].splitlines())) > width] == []


def test_every_method_that_is_referred_to_exists() -> None:
    known = {*entries(), "close", *NO_CALLS}
    for name, text in TEXTS.items():
        related = re.search(r"^See also: ([^:]*?)\.$", text, re.MULTILINE)
        mentioned = re.findall(r"\b[a-z]+(?:_\w+)+\b", related[1]) if related else []
        assert [other for other in mentioned if other not in known] == [], name


def test_forty_calls_have_an_example() -> None:
    assert sum(map(has_example, TEXTS.values())) >= 40


def test_every_call_has_an_entry_of_its_own() -> None:
    assert sorted(set(METHODS) - {"close"} - NO_CALLS - set(entries())) == []


def test_entries_for_a_newer_libnbd_say_enough_too() -> None:
    found = entries()
    assert len(found) >= 161
    assert [name for name, text in found.items() if len(text) < LEAST] == []


def test_help_of_the_module_starts_with_a_summary() -> None:
    lines = rendered(nbd)
    assert lines[2] == "NAME"
    assert lines[3].startswith("    nbd - libnbd for Python: ")
    assert "    Quick start:" in lines[:10]


def test_help_of_pread_fits_on_a_screen() -> None:
    lines = rendered(nbd.NBD.pread)
    assert len(lines) < ROWS, "a pager needs the last row for itself"
    assert max(map(len, lines)) <= COLUMNS


def test_help_of_the_class_has_an_index_in_the_order_of_use() -> None:
    index = documentation(nbd.NBD)
    titles = re.findall(r"^([A-Z][\w ]+): \w+,", index, re.MULTILINE)
    order = ["Set up", "Connect", "Negotiate", "Query", "Read and write", "Asynchronous", "Debug"]
    assert titles[: len(order)] == order
    assert [name for name in METHODS if not re.search(rf"\b{name}\b", index)] in ([], ["close"])


@pytest.mark.skipif(
    not hasattr(nbd.NBD, "_fields"), reason="pydoc sorts by name where a class has no _fields"
)
def test_help_of_the_class_lists_methods_in_the_order_of_use() -> None:
    listed = re.findall(r"^ \|  (\w+)\(", "\n".join(rendered(nbd.NBD)), re.MULTILINE)
    index = re.findall(r"\w+", documentation(nbd.NBD))
    places = [index.index(name) for name in listed if name in METHODS and name != "close"]
    assert len(places) == len(METHODS) - 1
    assert places == sorted(places)
