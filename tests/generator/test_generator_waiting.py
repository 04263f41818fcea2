"""How the generator finds the calls that wait, from the declarations alone."""

from __future__ import annotations

import pytest
from support import checkout  # noqa: F401 - finds the generator

from generator.emit_glue_source import glue_source
from generator.emit_methods import methods_module
from generator.model import Header, Waits
from generator.read import parse
from generator.waiting import stoppable

PRELUDE = """
typedef struct { int (*callback) (void *user_data, int *error); void *user_data;
                 void (*free) (void *user_data); } nbd_completion_callback;
typedef struct { int (*callback) (void *user_data, const char *colour); void *user_data;
                 void (*free) (void *user_data); } nbd_colour_callback;
"""
H = "struct nbd_handle *h"
COMPLETION = "nbd_completion_callback completion_callback"
READ = "void *buf, size_t count, uint64_t offset"


def header(*declarations: str) -> Header:
    """Return the model of some declarations."""
    text = PRELUDE + "".join(f"extern {declaration};\n" for declaration in declarations)
    return stoppable(parse(text, ""))


def names(found: Header) -> list[str]:
    """Return the names of the calls that wait."""
    return [function.name for function in found.functions]


@pytest.mark.parametrize(
    ("wanted", "declarations"),
    [
        pytest.param(
            Waits.COMMAND,
            [
                f"int nbd_paint ({H}, uint64_t count, uint32_t flags)",
                f"int64_t nbd_aio_paint ({H}, uint64_t count, {COMPLETION}, uint32_t flags)",
            ],
            id="command",
        ),
        pytest.param(
            Waits.COMMAND,
            [
                f"int nbd_paint ({H}, nbd_colour_callback colour_callback, uint32_t flags)",
                f"int64_t nbd_aio_paint ({H}, nbd_colour_callback colour_callback, {COMPLETION}, "
                "uint32_t flags)",
            ],
            id="command with a callback",
        ),
        pytest.param(
            Waits.OPTION,
            [f"int nbd_opt_paint ({H})", f"int nbd_aio_opt_paint ({H}, {COMPLETION})"],
            id="option",
        ),
        pytest.param(
            Waits.CONNECT,
            [
                f"int nbd_connect_paint ({H}, const char *place)",
                f"int nbd_aio_connect_paint ({H}, const char *place)",
            ],
            id="connect",
        ),
        pytest.param(Waits.BY_HAND, [f"int nbd_poll ({H}, int timeout)"], id="poll"),
        pytest.param(Waits.IN_LIBNBD, [f"int nbd_paint ({H}, uint32_t flags)"], id="no other form"),
        pytest.param(
            Waits.IN_LIBNBD,
            [
                f"int nbd_paint ({H}, uint64_t count, uint32_t flags)",
                f"int64_t nbd_aio_paint ({H}, uint32_t count, {COMPLETION}, uint32_t flags)",
            ],
            id="other parameters",
        ),
        pytest.param(
            Waits.IN_LIBNBD,
            [
                f"int nbd_paint ({H}, uint64_t count)",
                f"int nbd_aio_paint ({H}, uint64_t count, {COMPLETION})",
            ],
            id="no cookie",
        ),
        pytest.param(
            Waits.IN_LIBNBD,
            [
                f"int64_t nbd_paint ({H}, uint64_t count)",
                f"int64_t nbd_aio_paint ({H}, uint64_t count, {COMPLETION})",
            ],
            id="no int",
        ),
        pytest.param(
            Waits.IN_LIBNBD,
            [f"int nbd_paint ({H}, int place)", f"int nbd_aio_paint ({H}, int place)"],
            id="no completion",
        ),
    ],
)
def test_how_a_call_waits_follows_from_its_declarations(
    wanted: Waits, declarations: list[str]
) -> None:
    assert header(*declarations).functions[0].waits is wanted


def test_a_command_of_a_later_libnbd_can_be_stopped() -> None:
    found = header(
        f"int nbd_paint ({H}, uint64_t count, uint32_t flags)",
        f"int64_t nbd_aio_paint ({H}, uint64_t count, {COMPLETION}, uint32_t flags)",
    )
    source = glue_source(found)
    assert "nbd_aio_paint(s->h, count, nbdshim_completion(&wait), flags)" in source
    assert "nbdshim_end_command(&wait, ret)" in source


def test_a_call_that_may_wait_inside_of_libnbd_has_its_turn() -> None:
    source = glue_source(header(f"int nbd_paint ({H}, uint32_t flags)"))
    assert 'nbdshim_begin(&wait, s, "nbd_paint")' in source
    assert "ret = nbd_paint(s->h, flags);" in source
    assert "nbdshim_end(&wait, ret == -1 ? -1 : 0);" in source


def test_a_call_that_reads_has_a_form_that_reads_into_a_buffer() -> None:
    found = header(
        f"int nbd_fetch ({H}, {READ}, uint32_t flags)",
        f"int64_t nbd_aio_fetch ({H}, {READ}, {COMPLETION}, uint32_t flags)",
    )
    assert names(found) == ["fetch", "fetch_into", "aio_fetch"]
    text = methods_module(found, {})
    assert "def fetch(self, count: int, offset: int, flags: int = 0) -> bytearray:" in text
    assert "def fetch_into(self, buf: WriteableBuffer | Buffer, offset: int," in text


def test_a_call_that_writes_or_has_a_callback_has_no_such_form() -> None:
    colour = "nbd_colour_callback colour_callback"
    found = header(
        f"int nbd_put ({H}, const void *buf, size_t count, uint32_t flags)",
        f"int64_t nbd_aio_put ({H}, const void *buf, size_t count, {COMPLETION}, uint32_t flags)",
        f"int nbd_fetch ({H}, {READ}, {colour}, uint32_t flags)",
        f"int64_t nbd_aio_fetch ({H}, {READ}, {colour}, {COMPLETION}, uint32_t flags)",
    )
    assert names(found) == ["put", "aio_put", "fetch", "aio_fetch"]
