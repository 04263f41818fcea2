"""From libnbd.h to the model: each rule, tried on a line of C."""

from __future__ import annotations

import pytest
from support.checkout import CHECKOUT

import nbd
from generator.library import BuildError, find_library
from generator.model import (
    CallbackArgument,
    CallbackKind,
    Closure,
    Function,
    Header,
    Kind,
    Parameter,
)
from generator.read import BY_HAND, INTEGERS, parse, read

COLOUR = "typedef struct { int (*callback) (void *user_data, int rgb); } nbd_colour_callback;"
PAIR = "typedef struct { uint64_t length; uint64_t flags; } nbd_pair;"


def function(
    parameters: str, before: str = "", macros: str = "", returns: str = "int "
) -> Function:
    """Return the model of a function nbd_f with these parameters after the handle."""
    header = parse(f"{before}\nextern {returns}nbd_f (struct nbd_handle *h{parameters});", macros)
    assert not header.unbound
    (only,) = header.functions
    assert only.name == "f"
    return only


def parameter(declaration: str, before: str = "", macros: str = "") -> Parameter:
    """Return the model of one parameter, together with its length if it has one."""
    (only,) = function(f", {declaration}", before, macros).parameters
    return only


def closure(arguments: str, before: str = "") -> Closure:
    """Return the model of a callback type with these arguments after user_data."""
    fields = f"int (*callback) (void *user_data{arguments}); void *user_data;"
    (only,) = parse(f"{before}\ntypedef struct {{ {fields} }} nbd_c_callback;", "").closures
    assert only.name == "c"
    return only


def reasons(header: Header) -> dict[str, str]:
    """Return the reasons for the functions that are not bound."""
    return dict(header.unbound)


def constants(macros: str) -> dict[str, object]:
    """Return the constants that lines of `#define` define."""
    return dict(parse("", macros).constants)


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("bool enable", Parameter("enable", Kind.BOOL, "bool")),
        ("int tls", Parameter("tls", Kind.INT, "int")),
        ("uint32_t flags", Parameter("flags", Kind.INT, "uint32_t")),
        ("uint64_t offset", Parameter("offset", Kind.INT, "uint64_t")),
        ("uintptr_t private_data", Parameter("private_data", Kind.INT, "uintptr_t")),
        ("unsigned int n", Parameter("n", Kind.INT, "unsigned int")),
        ("size_t i", Parameter("i", Kind.INT, "size_t")),
        ("const char *name", Parameter("name", Kind.STRING, "const char *")),
        ("const char *unixsocket", Parameter("unixsocket", Kind.PATH, "const char *")),
        ("const char *dir", Parameter("dir", Kind.PATH, "const char *")),
        ("const char *filename", Parameter("filename", Kind.PATH, "const char *")),
        ("char **argv", Parameter("argv", Kind.STRINGS, "char **")),
        (
            "const void *buf, size_t count",
            Parameter("buf", Kind.DATA, "const void *", length="count"),
        ),
        ("void *buf, size_t count", Parameter("buf", Kind.OUTPUT, "void *", length="count")),
        (
            "const struct sockaddr *addr, socklen_t addrlen",
            Parameter("addr", Kind.ADDRESS, "const struct sockaddr *", length="addrlen"),
        ),
    ],
)
def test_a_parameter_is_bound_by_its_type(declaration: str, expected: Parameter) -> None:
    assert parameter(declaration) == expected


@pytest.mark.parametrize("ctype", sorted(INTEGERS))
def test_every_integer_type_is_a_number(ctype: str) -> None:
    assert parameter(f"{ctype} n") == Parameter("n", Kind.INT, ctype)


def test_parameters_keep_their_order() -> None:
    found = function(", void *buf, size_t count, uint64_t offset, uint32_t flags").parameters
    assert [p.name for p in found] == ["buf", "offset", "flags"]


def test_a_callback_is_named_without_its_suffix() -> None:
    expected = Parameter("colour", Kind.CLOSURE, "nbd_colour_callback", "colour", optional=False)
    assert parameter("nbd_colour_callback colour_callback", COLOUR) == expected


def test_a_callback_with_a_null_macro_is_optional() -> None:
    macro = "#define NBD_NULL_COLOUR ((nbd_colour_callback) { .callback = NULL })"
    assert parameter("nbd_colour_callback colour_callback", COLOUR, macro).optional


@pytest.mark.parametrize("name", ["from", "self", "s", "ret", "size", "result", "failure_of"])
def test_a_name_that_generated_code_uses_gets_an_underscore(name: str) -> None:
    assert parameter(f"int {name}").name == f"{name}_"


@pytest.mark.parametrize("returns", ["int ", "int64_t ", "uint32_t ", "char *", "const char *"])
def test_a_return_type_is_kept(returns: str) -> None:
    assert function("", returns=returns).returns == returns.strip()


@pytest.mark.parametrize(
    ("declaration", "reason"),
    [
        ("void nbd_f (struct nbd_handle *h)", "no rule for the return type void"),
        ("struct pair *nbd_f (struct nbd_handle *h)", "no rule for the return type struct pair *"),
        ("int nbd_f (void)", "its first parameter is not a handle"),
        ("int nbd_f (int fd)", "its first parameter is not a handle"),
        ("int nbd_f (struct nbd_handle *h, ...)", "no rule for a variable number of arguments"),
        ("int nbd_f (struct nbd_handle *h, double d)", "no rule for the parameter double d"),
        ("int nbd_f (struct nbd_handle *h, struct p p)", "no rule for the parameter struct p p"),
        ("int nbd_f (struct nbd_handle *h, int a[2])", "no rule for a parameter of the form"),
        ("int nbd_f (struct nbd_handle *h, int (*g) (int))", "no rule for a parameter of the form"),
        ("int nbd_f (struct nbd_handle *h, int)", "a parameter of type int has no name"),
        ("int nbd_f (struct nbd_handle *h, void *buf)", "buf is not followed by a size_t"),
        ("int nbd_f (struct nbd_handle *h, void *p, int n)", "p is not followed by a size_t"),
        (
            "int nbd_f (struct nbd_handle *h, const struct sockaddr *addr, int n)",
            "addr is not followed by a socklen_t",
        ),
        (
            "int nbd_f (struct nbd_handle *h, nbd_odd_callback odd)",
            "no rule for the parameter nbd_odd_callback odd",
        ),
    ],
)
def test_a_function_that_no_rule_covers_is_named_with_the_reason(
    declaration: str, reason: str
) -> None:
    odd = "typedef struct { int (*callback) (double d); } nbd_odd_callback;"
    header = parse(f"{odd} extern {declaration}; extern int nbd_g (struct nbd_handle *h);", "")
    assert reason in reasons(header)["nbd_f"]
    assert [f.name for f in header.functions] == ["g"]


def test_a_header_that_is_not_c_gives_one_clear_message() -> None:
    with pytest.raises(BuildError, match=r"libnbd\.h is not C that pycparser understands: "):
        parse("extern int nbd_f (struct", "")


def test_functions_of_others_are_left_alone() -> None:
    header = parse("extern int read (int fd); int variable; extern void xnbd_f (void);", "")
    assert header == Header((), (), ())


def test_functions_that_make_and_close_handles_are_bound_by_hand() -> None:
    assert {"create", "close", "get_error", "get_errno"} == BY_HAND
    header = parse("extern void nbd_close (struct nbd_handle *h);", "")
    assert header == Header((), (), ())


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("const char *name", CallbackArgument("name", CallbackKind.STRING, "const char *")),
        ("uint64_t offset", CallbackArgument("offset", CallbackKind.INT, "uint64_t")),
        ("unsigned status", CallbackArgument("status", CallbackKind.INT, "unsigned")),
        ("int *error", CallbackArgument("error", CallbackKind.ERROR, "int *")),
        (
            "const void *subbuf, size_t count",
            CallbackArgument("subbuf", CallbackKind.VIEW, "const void *", "count"),
        ),
        (
            "uint32_t *entries, size_t nr_entries",
            CallbackArgument("entries", CallbackKind.INTS, "uint32_t", "nr_entries"),
        ),
        (
            "const uint64_t *entries, size_t nr_entries",
            CallbackArgument("entries", CallbackKind.INTS, "uint64_t", "nr_entries"),
        ),
        (
            "nbd_pair *pairs_of, size_t nr",
            CallbackArgument("pairs_of", CallbackKind.PAIRS, "nbd_pair", "nr"),
        ),
    ],
)
def test_an_argument_of_a_callback_is_bound_by_its_type(
    declaration: str, expected: CallbackArgument
) -> None:
    assert closure(f", {declaration}", PAIR).arguments == (expected,)


def test_a_callback_may_have_no_arguments() -> None:
    assert closure("").arguments == ()


def test_a_callback_that_is_shown_parts_of_a_buffer_says_so() -> None:
    assert closure(", const void *subbuf, size_t count").has_buffer
    assert not closure(", int rgb").has_buffer


def test_an_argument_of_a_callback_may_have_a_name_that_generated_code_uses() -> None:
    names = [argument.name for argument in closure(", int token, int callback, int size").arguments]
    assert names == ["token_", "callback_", "size_"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("int x;", "no function pointer called callback"),
        ("void (*callback) (void *user_data);", "its callback is not int (*) (void *user_data"),
        ("int (*callback) (int x);", "its callback is not int (*) (void *user_data"),
        (
            "int (*callback) (void *user_data, double d);",
            "no rule for the callback argument double",
        ),
        ("int (*callback) (void *user_data, const void *p);", "p is not followed by a size_t"),
    ],
)
def test_a_callback_type_that_no_rule_covers_is_named_with_the_reason(
    fields: str, reason: str
) -> None:
    header = parse(f"typedef struct {{ {fields} }} nbd_odd_callback; {COLOUR}", "")
    assert reason in reasons(header)["nbd_odd_callback"]
    assert [c.name for c in header.closures] == ["colour"]


def test_an_array_of_other_structs_is_not_bound() -> None:
    triple = "typedef struct { uint64_t a, b, c; } nbd_triple;"
    fields = "int (*callback) (void *user_data, nbd_triple *t, size_t n);"
    header = parse(f"{triple} typedef struct {{ {fields} }} nbd_odd_callback;", "")
    assert "no rule for the callback argument nbd_triple * t" in reasons(header)["nbd_odd_callback"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("0x10U", 16),
        ("0777", 511),
        ("0", 0),
        ("18446744073709551615ULL", 2**64 - 1),
        ("(-1)", -1),
        ("~0", -1),
        ("(1U << 16)", 65536),
        ("1 | 2 | 4", 7),
        ("0xff & ~0x0f", 0xF0),
        ("64 * 1024 * 1024 - 1", 2**26 - 1),
        ("((uint64_t) 1 << 40)", 2**40),
        ('"base:allocation"', "base:allocation"),
        ('"qemu:" "dirty-bitmap:"', "qemu:dirty-bitmap:"),
        ("LIBNBD_OTHER", 3),
        ("(LIBNBD_OTHER | UNRELATED)", 11),
    ],
)
def test_a_constant_has_the_value_that_c_gives_it(text: str, value: object) -> None:
    others = "#define LIBNBD_OTHER (INNER + 1)\n#define INNER 2\n#define UNRELATED 8\n"
    assert constants(f"{others}#define LIBNBD_A {text}")["A"] == value


@pytest.mark.parametrize(
    "text",
    ["sizeof (int)", "f (1)", "1.5", "'a'", "UNDEFINED", "LIBNBD_A", "{ 1 }", '-"a"', r'"a\n"'],
)
def test_a_constant_that_cannot_be_evaluated_is_named_with_the_reason(text: str) -> None:
    header = parse("", f"#define LIBNBD_A {text}\n#define LIBNBD_B 1")
    assert header.constants == (("B", 1),)
    assert reasons(header)["LIBNBD_A"]


def test_macros_that_are_no_constants_are_left_alone() -> None:
    macros = """\
#define LIBNBD_H
#define LIBNBD_HAVE_NBD_PREAD 1
#define LIBNBD_ATTRIBUTE_NONNULL(...) 1
#define LIBNBD_GCC_VERSION 12
#define LIBNBD_CALL(x) 1
#define __STDC__ 1
#define NBD_NULL_COMPLETION 1
"""
    assert parse("", macros) == Header((), (), ())


def test_constants_are_in_the_order_of_their_names() -> None:
    macros = "#define LIBNBD_B 1\n#define LIBNBD_C 2\n#define LIBNBD_A 3"
    assert [name for name, _ in parse("", macros).constants] == ["A", "B", "C"]


def test_the_installed_header_is_bound_without_exception() -> None:
    header = read(find_library().header)
    assert header.unbound == ()
    assert [f.name for f in header.functions if not hasattr(nbd.NBD, f.name)] == []
    assert {name: getattr(nbd, name) for name, _ in header.constants} == dict(header.constants)


def test_no_parameter_of_the_installed_header_is_renamed() -> None:
    functions = read(find_library().header).functions
    assert [p.name for f in functions for p in f.parameters if p.name.endswith("_")] == []


def test_the_generator_is_the_checkouts_and_the_package_is_not() -> None:
    assert not str(nbd.__file__).startswith(str(CHECKOUT / "nbd"))
