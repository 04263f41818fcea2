"""Names, signatures and constants equal those of libnbd's own Python module.

The reference is the python3-libnbd of the system's Python. It is inspected in a separate process by
the same code as our module, and only if both use the same version of libnbd.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any, Optional

import pytest
from support.handles import OWN_METHODS
from support.servers import TIMEOUT

SYSTEM_PYTHON = "/usr/bin/python3"

# {name: value} for the constants, {name: [[parameter, kind, default], ...]} for the others.
Signature = list[list[Optional[str]]]

DESCRIBE = """
import inspect, json, sys
import nbd

def signature(thing):
    return [
        [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
        for p in inspect.signature(thing).parameters.values()
    ]

def public(thing):
    found = {name: getattr(thing, name) for name in dir(thing) if not name.startswith("_")}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}

def methods(cls):
    found = {name: value for name, value in public(cls).items() if callable(value)}
    return {name: signature(value) for name, value in found.items()}

def star():
    found = {}
    exec("from nbd import *", found)
    return sorted(name for name, value in found.items() if name in names)

names = public(nbd)
print(json.dumps({
    "libnbd": nbd.NBD().get_version(),
    "reference": "libnbdmod" in sys.modules,
    "names": sorted(names),
    "star": star(),
    "homes": {name: value.__module__ for name, value in names.items() if inspect.isclass(value)},
    "kinds": {name: type(value).__name__ for name, value in names.items()},
    "constants": {n: v for n, v in names.items() if isinstance(v, (int, str))},
    "NBD": methods(nbd.NBD),
    "NBD()": signature(nbd.NBD),
    "Buffer": methods(nbd.Buffer),
    "Buffer()": signature(nbd.Buffer),
    "Error": sorted(set(public(nbd.Error)) - set(public(Exception))),
    "undocumented": [n for n, v in public(nbd.NBD).items() if not inspect.getdoc(v)],
    "nbd()": signature(nbd.nbd) if hasattr(nbd, "nbd") else None,
}))
"""


def describe(python: str) -> dict[str, Any] | None:
    """Return a description of a Python's nbd module, or None if it has none."""
    # -I keeps the current folder off the path, so that nothing shadows the installed module.
    done = subprocess.run(
        [python, "-I", "-c", DESCRIBE], capture_output=True, text=True, timeout=TIMEOUT
    )
    if "ModuleNotFoundError" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    description: dict[str, Any] = json.loads(done.stdout)
    return description


@cache
def ours() -> dict[str, Any]:
    """Describe the module under test."""
    description = describe(sys.executable)
    assert description is not None
    return description


@cache
def system() -> dict[str, Any] | str:
    """Describe libnbd's own module, or return a reason why it cannot be compared."""
    try:
        found = describe(SYSTEM_PYTHON)
    except FileNotFoundError:
        return f"there is no {SYSTEM_PYTHON}"
    if found is None or not found["reference"]:
        return f"{SYSTEM_PYTHON} has no libnbd module (Debian package: python3-libnbd)"
    if found["libnbd"] != ours()["libnbd"]:
        return f"python3-libnbd is {found['libnbd']}, but ours uses libnbd {ours()['libnbd']}"
    return found


@pytest.fixture
def reference() -> dict[str, Any]:
    """Return the description of libnbd's own module, or skip."""
    found = system()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def differences(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Return what ours lacks of the reference, or has with a different description."""
    return {
        name: {"reference": value, "ours": mine.get(name, "absent")}
        for name, value in theirs.items()
        if name not in mine or mine[name] != value
    }


def test_every_public_name_is_there(reference: dict[str, Any]) -> None:
    assert set(reference["names"]) - set(ours()["names"]) == set()


def test_a_star_import_brings_every_public_name(reference: dict[str, Any]) -> None:
    assert set(reference["star"]) - set(ours()["star"]) == set()


def test_every_class_says_that_it_is_of_the_same_module(reference: dict[str, Any]) -> None:
    assert set(reference["homes"]) >= {"NBD", "Buffer", "Error"}
    assert differences(reference["homes"], ours()["homes"]) == {}


def test_every_public_name_is_of_the_same_kind(reference: dict[str, Any]) -> None:
    assert differences(reference["kinds"], ours()["kinds"]) == {}


def test_every_constant_has_the_same_value(reference: dict[str, Any]) -> None:
    assert len(reference["constants"]) >= 30
    assert differences(reference["constants"], ours()["constants"]) == {}


def test_no_other_constant_is_defined(reference: dict[str, Any]) -> None:
    assert differences(ours()["constants"], reference["constants"]) == {}


def test_every_method_of_a_handle_has_the_same_signature(reference: dict[str, Any]) -> None:
    assert len(reference["NBD"]) >= 120
    assert differences(reference["NBD"], ours()["NBD"]) == {}


def test_a_handle_has_no_other_method_but_close(reference: dict[str, Any]) -> None:
    # Programs use hasattr to find out what the libnbd in use can do.
    assert set(ours()["NBD"]) - set(reference["NBD"]) <= {"close", *OWN_METHODS}


def test_every_method_of_a_buffer_has_the_same_signature(reference: dict[str, Any]) -> None:
    assert set(reference["Buffer"]) >= {"from_buffer", "from_bytearray", "is_zero", "to_buffer"}
    assert differences(reference["Buffer"], ours()["Buffer"]) == {}


def test_the_constructors_have_the_same_signature(reference: dict[str, Any]) -> None:
    assert ours()["NBD()"] == reference["NBD()"]
    assert ours()["Buffer()"] == reference["Buffer()"]


def test_the_context_manager_has_the_same_signature(reference: dict[str, Any]) -> None:
    if reference["nbd()"] is None:
        pytest.skip(f"python3-libnbd {reference['libnbd']} has no context manager nbd.nbd()")
    assert ours()["nbd()"] == reference["nbd()"]


def test_an_error_has_the_same_attributes(reference: dict[str, Any]) -> None:
    assert ours()["Error"] == reference["Error"] == ["errno", "errnum", "string"]


def test_every_method_is_documented() -> None:
    assert ours()["undocumented"] == []


def test_the_context_manager_takes_nothing() -> None:
    assert ours()["nbd()"] == []


def test_close_takes_nothing() -> None:
    assert ours()["NBD"]["close"] == [["self", "POSITIONAL_OR_KEYWORD", None]]
