"""What C cannot express: the meaning of results, optional parameters, and documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import checkout  # noqa: F401 - makes generator importable

from generator.calls import (
    LOCK_FREE,
    Documentation,
    Returns,
    has_default,
    in_order_of_use,
    load_documentation,
    parse_documentation,
    returned,
)
from generator.library import find_library
from generator.model import Function, Header
from generator.read import parse, read

PRELUDE = """\
typedef struct { int (*callback) (void *user_data, int *error); } nbd_completion_callback;
"""
OPTIONAL = "#define NBD_NULL_COMPLETION { 0 }\n"


def header(*declarations: str) -> Header:
    """Return the model of some declarations, in which H stands for the handle."""
    lines = "".join(f"extern {d};\n" for d in declarations)
    return parse(PRELUDE + lines.replace("(H", "(struct nbd_handle *h"), OPTIONAL)


def meaning(declaration: str, *others: str) -> Returns:
    """Return the meaning of the result of the first function declared."""
    found = header(declaration, *others)
    return returned(found.functions[0], found)


def defaults(declaration: str) -> list[str]:
    """Return the names of the optional parameters."""
    (function,) = header(declaration).functions
    return [p.name for p in function.parameters if has_default(function, p)]


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("int nbd_is_sunny (H)", Returns.TRUTH),
        ("int nbd_can_rain (H)", Returns.TRUTH),
        ("int nbd_supports_snow (H)", Returns.TRUTH),
        ("int nbd_aio_is_cloudy (H)", Returns.TRUTH),
        ("int nbd_aio_command_completed (H, uint64_t cookie)", Returns.TRUTH),
        ("int nbd_get_snow_negotiated (H)", Returns.TRUTH),
        ("int nbd_opt_starttls (H)", Returns.TRUTH),
        ("bool nbd_rains (H)", Returns.TRUTH),
        ("int nbd_predict (H)", Returns.NOTHING),
        ("int nbd_set_wind (H, uint32_t flags)", Returns.NOTHING),
        ("int nbd_aio_connect_sun (H)", Returns.NOTHING),
        ("int nbd_get_wind (H)", Returns.NUMBER),
        ("int nbd_aio_get_fd (H)", Returns.NUMBER),
        ("int nbd_aio_in_flight (H)", Returns.NUMBER),
        ("int nbd_poll (H, int timeout)", Returns.NUMBER),
        ("int nbd_poll2 (H, int fd, int timeout)", Returns.NUMBER),
        ("int nbd_opt_list (H)", Returns.NUMBER),
        ("int64_t nbd_degrees (H)", Returns.NUMBER),
        ("ssize_t nbd_get_nr_clouds (H)", Returns.NUMBER),
        ("uint32_t nbd_get_rain_flags (H)", Returns.NUMBER),
        ("unsigned nbd_aio_get_direction (H)", Returns.NUMBER),
        ("uint64_t nbd_stats_drops (H)", Returns.UNSIGNED),
        ("uintptr_t nbd_get_private_data (H)", Returns.UNSIGNED),
        ("size_t nbd_get_room (H)", Returns.UNSIGNED),
        ("char *nbd_get_place (H)", Returns.OWNED_TEXT),
        ("const char *nbd_get_protocol (H)", Returns.TEXT),
    ],
)
def test_a_return_value_means(declaration: str, expected: Returns) -> None:
    assert meaning(declaration) is expected


def test_a_getter_whose_setter_takes_a_bool_is_a_question() -> None:
    getter, setter = "int nbd_get_umbrella (H)", "int nbd_set_umbrella (H, bool open)"
    assert meaning(getter, setter) is Returns.TRUTH
    assert meaning(getter, setter.replace("bool", "int")) is Returns.NUMBER
    assert meaning(getter, setter.replace(")", ", int colour)")) is Returns.NUMBER


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("int nbd_f (H, uint64_t offset, uint32_t flags)", ["flags"]),
        ("int nbd_f (H, uint32_t flags, uint64_t offset)", []),
        ("int nbd_f (H, uint64_t flags)", []),
        ("int nbd_f (H, uint32_t mask)", []),
        ("int nbd_set_f (H, uint32_t flags)", []),
        (
            "int nbd_f (H, nbd_completion_callback completion_callback, uint32_t flags)",
            ["completion", "flags"],
        ),
    ],
)
def test_optional_parameters_have_defaults(declaration: str, expected: list[str]) -> None:
    assert defaults(declaration) == expected


def test_a_callback_without_a_null_macro_is_required() -> None:
    declaration = "int nbd_f (struct nbd_handle *h, nbd_completion_callback completion_callback);"
    (function,) = parse(f"{PRELUDE}extern {declaration}", "").functions
    assert not has_default(function, function.parameters[0])


def test_calls_without_lock_exist() -> None:
    # The others are in later versions of libnbd.
    later = {"get_version_extra", "supports_vsock"}
    names = {f.name for f in read(find_library().header).functions}
    assert names | later >= LOCK_FREE


ENTRIES = """\
Weather

== sunny (1.2)
Say that it is sunny.

It is.

== rainy (1.26)
Say that it rains.
"""


def test_documentation_is_a_title_and_entries() -> None:
    assert dict(parse_documentation(ENTRIES)) == {
        "sunny": Documentation("Weather", "1.2", "Say that it is sunny.\n\nIt is."),
        "rainy": Documentation("Weather", "1.26", "Say that it rains."),
    }


def test_documentation_is_read_in_the_order_of_the_files_names(tmp_path: Path) -> None:
    (tmp_path / "20-later.txt").write_text("Later\n\n== b (1.0)\nB.\n", encoding="utf-8")
    (tmp_path / "10-first.txt").write_text("First\n\n== c (1.0)\nC.\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("== a (1.0)\nA.\n", encoding="utf-8")
    assert list(load_documentation(tmp_path)) == ["c", "b"]


def test_calls_come_in_the_order_of_the_documentation_and_unknown_ones_last() -> None:
    found = header("int nbd_new (H)", "int nbd_rainy (H)", "int nbd_sunny (H)")
    groups = in_order_of_use(found, dict(parse_documentation(ENTRIES)))
    assert [(title, names(functions)) for title, functions in groups] == [
        ("Weather", ["sunny", "rainy"]),
        ("Other calls", ["new"]),
    ]


def names(functions: list[Function]) -> list[str]:
    """Return their names."""
    return [function.name for function in functions]
