# SPDX-License-Identifier: LGPL-2.0-or-later
"""Make the model from the text of libnbd.h, with one rule for each C type."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pycparser import c_ast, c_generator, c_parser

from generator.constants import evaluate, is_constant
from generator.library import BuildError
from generator.model import (
    ORPHAN_PIN,
    CallbackArgument,
    CallbackKind,
    Closure,
    Function,
    Header,
    Kind,
    Parameter,
    Unbindable,
)
from generator.preprocess import PRELUDE, TYPES, object_macros, preprocess

#: The C types of integers.  Python passes them to C as int.
INTEGERS = frozenset(TYPES) - {"bool"} | {
    "int", "unsigned", "unsigned int", "long", "unsigned long", "short", "char",
    "long long", "unsigned long long",
}  # fmt: skip

#: The shim binds these by hand: they create or close a handle, or report the last error.
BY_HAND = frozenset({"create", "close", "get_error", "get_errno"})

#: Parameters with these names are file names, for which Python also takes bytes and os.PathLike.
#: In C they are const char *, like other strings.
PATHS = frozenset({"unixsocket", "dir", "filename"})

#: Names that the bodies of the generated functions use.  A parameter with such a name would shadow
#: it, so the parameter gets a "_" at its end: `size` becomes `size_`.  The list includes Python's
#: keywords, which cannot be names of parameters.  libnbd 1.24 has no such parameter; the list is
#: for newer versions.
RESERVED = frozenset(keyword.kwlist) | {
    # Variables of the C glue, and the function of C that it calls.
    *("s", "ret", "refused", "was_stale", "memset", "wait"),
    # Variables of the methods.
    *("self", "raised", "result", "pointer", "size", "state", "target", "pin"),
    *("_alive", ORPHAN_PIN),
    # What methods.py imports from the package.
    *("pending", "registry", "readable", "writable", "writable_by_call", "is_unowned"),
    *("BOUNCES", "from_buffer"),
    *("new_result", "new_shown_result", "result_of", "shown_result_of"),
    *("address_of", "as_number", "as_path", "as_string", "as_strings", "as_text", "owned_text"),
    *("abandon", "copy_back", "explained", "failure_of", "next_token", "not_callable"),
    *("raise_pending", "lib", "NEVER_STALE"),
    # Builtins that the methods use.
    *("bool", "bytearray", "bytes", "callable", "len", "type"),
    *("BaseException", "Exception"),
}

#: The same for the arguments of a callback, whose functions use more names.
RESERVED_IN_CALLBACKS = RESERVED | {
    # Variables of nbdglue.c and upcalls.py.
    *("closure", "upcall", "token", "callback", "entry", "i"),
    # What upcalls.py imports from the package.
    *("forget", "keep", "part", "unpack", "pairs", "string", "bring_back", "set_errno"),
    *("already_called", "as_int", "ErrorNumber", "_getframe"),
    # A builtin that the functions use.
    "UnicodeDecodeError",
}


def read(header: Path) -> Header:
    """The model of a libnbd.h."""
    return parse(preprocess(header), preprocess(header, "-dM"))


def parse(declarations: str, macros: str) -> Header:
    """The model of libnbd.h, from its preprocessed text and its macros (`cc -E -dM`).

    A declaration that no rule covers does not fail the build, because a newer libnbd may have one.
    The model lists it as unbound.

    Raises:
        BuildError: pycparser cannot parse the text.
    """
    defined = {name: text for name, text in object_macros(macros) if text}
    # libnbd.h has a macro NBD_NULL_X for each callback type X that is optional.
    optional = frozenset(
        name[len("NBD_NULL_") :].lower() for name in defined if name.startswith("NBD_NULL_")
    )
    try:
        tree = c_parser.CParser().parse(PRELUDE + declarations, filename="libnbd.h")
    except Exception as reason:  # pycparser's ParseError has moved between its versions
        raise BuildError(f"libnbd.h is not C that pycparser understands: {reason}") from None
    structs = dict(struct_typedefs(tree))
    closures: dict[str, Closure] = {}
    functions: list[Function] = []
    unbound: list[tuple[str, str]] = []
    for name, fields in structs.items():
        if name.startswith("nbd_") and name.endswith("_callback"):
            try:
                closure = read_closure(name[len("nbd_") : -len("_callback")], fields, structs)
            except Unbindable as reason:
                unbound.append((name, str(reason)))
            else:
                closures[name] = closure
    for name, declaration in function_declarations(tree):
        if name in BY_HAND:
            continue
        try:
            functions.append(read_function(name, declaration, closures, optional))
        except Unbindable as reason:
            unbound.append((f"nbd_{name}", str(reason)))
    constants: list[tuple[str, int | str]] = []
    for name in sorted(filter(is_constant, defined)):
        try:
            constants.append((name[len("LIBNBD_") :], evaluate(name, defined)))
        except Unbindable as reason:
            unbound.append((name, str(reason)))
    return Header(tuple(functions), tuple(closures.values()), tuple(constants), tuple(unbound))


def function_declarations(tree: c_ast.FileAST) -> Iterator[tuple[str, c_ast.FuncDecl]]:
    """The names, without the prefix nbd_, and the types of all functions of the header."""
    for node in tree.ext:
        is_function = isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl)
        if is_function and node.name.startswith("nbd_"):
            yield node.name[len("nbd_") :], node.type


def struct_typedefs(tree: c_ast.FileAST) -> Iterator[tuple[str, list[c_ast.Decl]]]:
    """The name and the fields of every `typedef struct { ... } name;`."""
    for node in tree.ext:
        is_named = isinstance(node, c_ast.Typedef) and isinstance(node.type, c_ast.TypeDecl)
        if is_named and isinstance(node.type.type, c_ast.Struct) and node.type.type.decls:
            yield node.name, node.type.type.decls


def spell(node: c_ast.Node) -> str:
    """A type in C syntax, without the name of a parameter: `const char *`."""
    text: str = c_generator.CGenerator().visit(c_ast.Typename(None, [], None, strip_name(node)))
    return text


def strip_name(node: c_ast.Node) -> c_ast.Node:
    """The same type without the name that it declares."""
    if isinstance(node, c_ast.PtrDecl):
        return c_ast.PtrDecl(node.quals, strip_name(node.type))
    if isinstance(node, c_ast.TypeDecl):
        return c_ast.TypeDecl(None, node.quals, None, node.type)
    raise Unbindable(f"no rule for a parameter of the form {type(node).__name__}")


class Declared(NamedTuple):
    """A parameter as C declares it.  One Parameter of the model may be two of these."""

    name: str
    ctype: str


def declared_parameters(
    declaration: c_ast.FuncDecl, reserved: frozenset[str] = RESERVED
) -> list[Declared]:
    """The parameters of a function: none for (void).  A reserved name gets a "_" at its end."""
    listed = [] if declaration.args is None else declaration.args.params
    if any(isinstance(node, c_ast.EllipsisParam) for node in listed):
        raise Unbindable("no rule for a variable number of arguments")
    names = [getattr(node, "name", None) or "" for node in listed]
    found = [
        Declared(f"{name}_" if name in reserved else name, spell(node.type))
        for name, node in zip(names, listed)
    ]
    return [p for p in found if p.ctype != "void"]


def read_function(
    name: str,
    declaration: c_ast.FuncDecl,
    closures: Mapping[str, Closure],
    optional: frozenset[str],
) -> Function:
    """The model of one call.  Raises Unbindable if one of its types has no rule."""
    declared = declared_parameters(declaration)
    if not declared or declared[0].ctype != "struct nbd_handle *":
        raise Unbindable("its first parameter is not a handle")
    returns = spell(declaration.type)
    if returns not in INTEGERS | {"bool", "char *", "const char *"}:
        raise Unbindable(f"no rule for the return type {returns}")
    parameters: list[Parameter] = []
    rest = iter(declared[1:])
    for parameter in rest:
        parameters.append(read_parameter(parameter, rest, closures, optional))
    return Function(name, returns, tuple(parameters))


def read_parameter(
    declared: Declared,
    rest: Iterator[Declared],
    closures: Mapping[str, Closure],
    optional: frozenset[str],
) -> Parameter:
    """The model of one parameter.  If it has a length, that is taken from `rest`."""
    name, ctype = declared
    if not name:
        raise Unbindable(f"a parameter of type {ctype} has no name")
    if ctype in closures:
        short = name[: -len("_callback")] if name.endswith("_callback") else name
        closure = closures[ctype].name
        return Parameter(short, Kind.CLOSURE, ctype, closure, closure in optional)
    if ctype in ("const void *", "void *"):
        kind = Kind.DATA if ctype.startswith("const") else Kind.OUTPUT
        return Parameter(name, kind, ctype, length=next_of_type(rest, "size_t", name).name)
    if ctype == "const struct sockaddr *":
        return Parameter(
            name, Kind.ADDRESS, ctype, length=next_of_type(rest, "socklen_t", name).name
        )
    if ctype == "const char *":
        return Parameter(name, Kind.PATH if name in PATHS else Kind.STRING, ctype)
    if ctype in ("char **", "const char **", "char * const *", "const char * const *"):
        return Parameter(name, Kind.STRINGS, ctype)
    if ctype == "bool":
        return Parameter(name, Kind.BOOL, ctype)
    if ctype in INTEGERS:
        return Parameter(name, Kind.INT, ctype)
    raise Unbindable(f"no rule for the parameter {ctype} {name}")


def next_of_type(rest: Iterator[Declared], ctype: str, owner: str) -> Declared:
    """The next parameter, which must be the length of the buffer that `owner` points to."""
    following = next(rest, None)
    if following is None or following.ctype != ctype:
        raise Unbindable(f"the pointer {owner} is not followed by a {ctype}")
    return following


def read_closure(
    name: str, fields: Sequence[c_ast.Decl], structs: Mapping[str, list[c_ast.Decl]]
) -> Closure:
    """The model of a callback type, made from the field `callback` of its struct."""
    pointer = next((field.type for field in fields if field.name == "callback"), None)
    if not isinstance(pointer, c_ast.PtrDecl) or not isinstance(pointer.type, c_ast.FuncDecl):
        raise Unbindable("its struct has no function pointer called callback")
    declared = declared_parameters(pointer.type, RESERVED_IN_CALLBACKS)
    if spell(pointer.type.type) != "int" or not declared or declared[0].name != "user_data":
        raise Unbindable("its callback is not int (*) (void *user_data, ...)")
    arguments: list[CallbackArgument] = []
    rest = iter(declared[1:])
    for argument in rest:
        arguments.append(read_callback_argument(argument, rest, structs))
    return Closure(name, tuple(arguments))


def read_callback_argument(
    declared: Declared, rest: Iterator[Declared], structs: Mapping[str, list[c_ast.Decl]]
) -> CallbackArgument:
    """The model of one argument of a callback.  Its length, if any, is taken from `rest`."""
    name, ctype = declared
    if ctype == "const char *":
        return CallbackArgument(name, CallbackKind.STRING, ctype)
    if ctype == "int *":
        return CallbackArgument(name, CallbackKind.ERROR, ctype)
    if ctype == "const void *":
        length = next_of_type(rest, "size_t", name).name
        return CallbackArgument(name, CallbackKind.VIEW, ctype, length)
    if ctype in INTEGERS:
        return CallbackArgument(name, CallbackKind.INT, ctype)
    item = ctype[: -len(" *")] if ctype.endswith(" *") else ""
    item = item[len("const ") :] if item.startswith("const ") else item
    if item in INTEGERS:
        return CallbackArgument(
            name, CallbackKind.INTS, item, next_of_type(rest, "size_t", name).name
        )
    if item in structs and [spell(field.type) for field in structs[item]] == ["uint64_t"] * 2:
        length = next_of_type(rest, "size_t", name).name
        return CallbackArgument(name, CallbackKind.PAIRS, item, length)
    raise Unbindable(f"no rule for the callback argument {ctype} {name}")
