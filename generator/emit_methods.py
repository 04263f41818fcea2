# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write methods.py: the class NBD, with one method for each call of libnbd.

Users see the generated code in help(), tracebacks and debuggers, so it is formatted to be read.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from generator.calls import (
    LOCK_FREE,
    Documentation,
    Returns,
    has_default,
    in_order_of_use,
    moves_connection,
    returned,
)
from generator.model import ORPHAN_PIN, Function, Header, Kind, Parameter, Waits
from generator.text import banner, wrap

BANNER = banner(__name__)

#: The annotations of parameters.  A bool takes any object, by its truth value.
ANNOTATIONS = {
    Kind.BOOL: "object",
    Kind.INT: "int",
    Kind.STRING: "str",
    Kind.PATH: "StrOrBytesPath",
    Kind.STRINGS: "Sequence[str]",
    Kind.DATA: "ReadableBuffer | Buffer",
    Kind.OUTPUT: "WriteableBuffer | Buffer",
    Kind.ADDRESS: "Address",
}

#: The callback types that have a class in nbd.types.  One of a newer libnbd is annotated as any
#: callable.
NAMED_CALLBACKS = ("chunk", "completion", "context", "debug", "extent", "extent64", "list")

#: The methods of nbd._binding.handle, which are not calls of libnbd.
OWN = ("settimeout", "gettimeout")

RETURN_ANNOTATIONS = {
    Returns.NOTHING: "None",
    Returns.TRUTH: "bool",
    Returns.NUMBER: "int",
    Returns.UNSIGNED: "int",
    Returns.TEXT: "str",
    Returns.OWNED_TEXT: "str",
}


def methods_module(header: Header, documentation: Mapping[str, Documentation]) -> str:
    """The text of methods.py."""
    groups = in_order_of_use(header, documentation)
    methods = [
        method(function, header, documentation.get(function.name))
        for _, functions in groups
        for function in functions
    ]
    used = "".join(methods)
    bindings = "\n".join(f"nbdcall_{f.name} = lib.nbdcall_{f.name}" for f in header.functions)
    types = sorted(["Address", *map(callback_type, NAMED_CALLBACKS)])
    imported = "".join(f"        {name},\n" for name in types if f": {name}" in used)
    abstract = [name for name in ("Callable", "Sequence") if f": {name}[" in used]
    head = f'''\
{BANNER}"""The class NBD: one method for every call of libnbd.h."""

from __future__ import annotations

import nbd._binding.upcalls  # noqa: F401 - gives them to the shim
from nbd._binding.buffer import readable, writable, writable_by_call
from nbd._binding.callbacks import abandon, next_token, not_callable, registry
from nbd._binding.convert import (
    address_of,
    as_number,
    as_path,
    as_string,
    as_strings,
    owned_text,
)
from nbd._binding.errors import explained, failure_of, pending, raise_pending
from nbd._binding.handle import Handle
from nbd._binding.memory import (
    BOUNCES,
    NEVER_STALE,
    copy_back,
    from_buffer,
    is_unowned,
    new_result,
    new_shown_result,
    result_of,
    shown_result_of,
)
from nbd._binding.shim import as_text, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import {", ".join(abstract)}

    from _typeshed import ReadableBuffer, StrOrBytesPath, WriteableBuffer

    from nbd._binding.buffer import Buffer
    from nbd.types import (
{imported}    )

# Looked up once: a lookup in each call would take a tenth of the time of a short call.
{bindings}


class NBD(Handle):
    """A connection to an NBD server: a handle of libnbd.

{textwrap.indent(group_index(groups), "    ")}
    """

    __module__ = "nbd"

    # help() shows the methods in this order; without it, by name.
    _fields = (
{order_of_use(groups)}
    )
'''
    return "\n".join([head, *methods])


def group_index(groups: Sequence[tuple[str, Sequence[Function]]]) -> str:
    """The list of all methods for the docstring of the class."""
    blocks = [
        textwrap.fill(
            f"{group}: " + ", ".join(f.name for f in functions) + ".",
            width=72,
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for group, functions in groups
    ]
    blocks.append(f"Timeout: {', '.join(OWN)}.")
    return "Methods, in the order in which a program uses them:\n\n" + "\n\n".join(blocks)


def order_of_use(groups: Sequence[tuple[str, Sequence[Function]]]) -> str:
    """The names of the methods for the attribute _fields, in which pydoc finds their order."""
    names = [*(f.name for _, functions in groups for f in functions), *OWN]
    return "\n".join(f'        "{name}",' for name in names)


def callback_type(closure: str) -> str:
    """The annotation of a parameter that is a callback."""
    return (
        f"{closure.capitalize()}Callback" if closure in NAMED_CALLBACKS else "Callable[..., object]"
    )


def method(function: Function, header: Header, entry: Documentation | None) -> str:
    """The text of one method."""
    kind = returned(function, header)
    parts = ["self", *(p for q in function.parameters for p in python_parameter(function, q))]
    returns = RETURN_ANNOTATIONS[kind]
    if kind is Returns.NOTHING and reads_synchronously(function):
        returns = "bytearray"
    signature = wrap(f"def {function.name}({', '.join(parts)}) -> {returns}:", 4)
    body = "\n".join([docstring(function, entry), *statements(function, kind)])
    return f"{textwrap.indent(signature, ' ' * 4)}\n{textwrap.indent(body, ' ' * 8)}\n"


def reads_synchronously(function: Function) -> bool:
    """Whether the caller passes the number of bytes and gets them in a new bytearray."""
    buffer = function.buffer
    is_new = not function.filled_later
    return is_new and buffer is not None and buffer.kind is Kind.OUTPUT


def python_parameter(function: Function, parameter: Parameter) -> Iterator[str]:
    """A parameter in the signature of the method."""
    if parameter.kind is Kind.CLOSURE:
        annotation = callback_type(parameter.closure)
        yield f"{parameter.name}: {annotation}" + (" | None = None" if parameter.optional else "")
    elif parameter.kind is Kind.OUTPUT and not function.filled_later:
        yield f"{parameter.length}: int"
    else:
        default = " = 0" if has_default(function, parameter) else ""
        yield f"{parameter.name}: {ANNOTATIONS[parameter.kind]}{default}"


def docstring(function: Function, entry: Documentation | None) -> str:
    """The docstring of the method.  Its last line names the C function."""
    if entry is None:
        text = (
            f"Call nbd_{function.name} of libnbd.\n\n"
            "This build of the package knows this call only from libnbd.h. Its\n"
            "arguments and result follow the general rules; its manual page is\n"
            f"nbd_{function.name}(3)."
        )
        origin = f"C: nbd_{function.name}."
    else:
        text = entry.text
        called = function.aio_name if function.form_of else function.name
        origin = f"C: nbd_{called}, since libnbd {entry.since}."
    if function.waits is not Waits.IN_LIBNBD and not function.is_asynchronous:
        text = referring_to("settimeout", text)
    prefix = "r" if "\\" in text else ""
    return f'{prefix}"""{text}\n\n{origin}\n"""'


def referring_to(name: str, text: str) -> str:
    """A docstring with one more name in its last line, "See also"."""
    before, label, names = text.rpartition("See also: ")
    if not label:
        before, names = f"{text}\n\n", ""
    listed = [*names.rstrip(".").split(", "), name] if names else [name]
    listed = [" ".join(one.split()) for one in listed]
    last = f"See also: {', '.join(listed)}."
    return before + textwrap.fill(last, 72, subsequent_indent="    ", break_on_hyphens=False)


def statements(function: Function, kind: Returns) -> Iterator[str]:
    """The body of the method.

    All arguments are converted before a callable is registered.  A signal handler may raise an
    exception at any bytecode.  Then the method removes what it registered, except what the shim has
    already taken.
    """
    tokens = [f"{closure.name}_token" for closure in function.closures]
    body = [
        *conversions(function),
        *registrations(function),
        *call(function, kind),
        *failing(function, kind),
    ]
    if tokens:
        yield f"{' = '.join(tokens)} = 0"
    if not function.parameters and not moves_connection(function):
        yield from body
    else:
        yield "try:"
        yield textwrap.indent("\n".join(body), "    ")
        yield "except BaseException as raised:"
        if tokens:
            yield f"    abandon(self._h, {', '.join(tokens)})"
        numbers = [p for p in function.parameters if p.kind is Kind.INT]
        named = [f'{p.name}=({p.name}, "{p.ctype}")' for p in numbers]
        explained = wrap(f"raise explained({', '.join(['self._h', 'raised', *named])})", 12)
        yield textwrap.indent(explained, "    ")
    yield from outcome(function, kind)


def call(function: Function, kind: Returns) -> Iterator[str]:
    """The call of the flat function."""
    arguments = ["self._h", *(a for p in function.parameters for a in c_arguments(function, p))]
    is_text = kind in (Returns.TEXT, Returns.OWNED_TEXT)
    declared = "result" if is_text else "result: int"
    yield wrap(f"{declared} = nbdcall_{function.name}({', '.join(arguments)})", 12)


def conversions(function: Function) -> Iterator[str]:
    """Convert the arguments from Python to C, check the callables and pin the buffer."""
    for parameter in function.parameters:
        name = parameter.name
        if parameter.kind is Kind.INT:
            yield f"if type({name}) is not int:"
            yield f'    {name} = as_number("{name}", {name})'
        elif parameter.kind is Kind.BOOL:
            yield f"{name} = bool({name})"
        elif parameter.kind is Kind.STRING:
            yield f'{name}_utf8 = as_string("{name}", {name})'
        elif parameter.kind is Kind.PATH:
            yield f'{name}_bytes = as_path("{name}", {name})'
        elif parameter.kind is Kind.STRINGS:
            yield f'{name}_array, _{name}_alive = as_strings("{name}", {name})'
        elif parameter.kind is Kind.ADDRESS:
            yield f"{name}_storage, {name}_size = address_of({name})"
    for closure in function.closures:
        name = closure.name
        unless = (
            f"({name} is None or callable({name}))" if closure.optional else f"callable({name})"
        )
        yield f"if not {unless}:"
        yield f'    raise not_callable("{name}", {name})'
    buffer = function.buffer
    if buffer is not None:
        yield from memory_of(function, buffer)


def memory_of(function: Function, buffer: Parameter) -> Iterator[str]:
    """Get the address and the size of a buffer, and pin it so that it stays in place.

    bytes and bytearray on CPython are the common cases.  The method handles them directly, without
    calling a function.
    """
    name, pin = buffer.name, pin_variable(function)
    if buffer.kind is Kind.DATA:
        yield f"if type({name}) is bytes and not BOUNCES:"
        yield f"    pointer, size, {pin} = {name}, len({name}), {name}"
        yield "else:"
        yield f'    pointer, size, {pin} = readable("{name}", {name})'
    elif function.filled_later:
        yield f"if type({name}) is bytearray and not BOUNCES:"
        yield f"    pointer = {pin} = from_buffer({name})"
        yield f"    size, state, target = len({pin}), NEVER_STALE, {name}"
        yield "else:"
        take = "writable_by_call" if function.form_of else "writable"
        yield f'    pointer, size, {pin}, state, target = {take}("{name}", {name})'
    else:
        yield f"size = {buffer.length}"
        yield f"if type({buffer.length}) is not int:"
        yield f'    size = as_number("{buffer.length}", {buffer.length})'
        made = "new_shown_result" if function.closures else "new_result"
        yield f"{name}, {pin} = {made}(size)"


def pin_variable(function: Function) -> str:
    """The variable that keeps the buffer of a call in place."""
    if function.has_buffer_alone:
        return ORPHAN_PIN
    is_data = function.buffer is not None and function.buffer.kind is Kind.DATA
    is_unused = is_data and function.waits is Waits.IN_LIBNBD and not function.closures
    return "_alive" if is_unused else "pin"


def registrations(function: Function) -> Iterator[str]:
    """Register the callables, each with the buffer of the call, which must live as long.

    If the call has a buffer, a token is registered even without a callable: libnbd uses the buffer
    until the token is released.
    """
    for closure in function.closures:
        name = closure.name
        entry = f"[{name}, self._h, {held(function)}]"
        if closure.optional and function.buffer is None:
            yield f"if {name} is not None:"
            yield f"    {name}_token = next_token()"
            yield f"    registry[{name}_token] = {entry}"
        else:
            yield f"{name}_token = next_token()"
            yield f"registry[{name}_token] = {entry}"


def held(function: Function) -> str:
    """The part of a registry entry for the buffer: the caller's object and the pin."""
    buffer = function.buffer
    if buffer is None:
        return "None, None"
    if reads_synchronously(function):
        return f"{buffer.name}, pin"
    return "target, pin" if buffer.kind is Kind.OUTPUT else "None, pin"


def c_arguments(function: Function, parameter: Parameter) -> Iterator[str]:
    """The arguments of the flat function for one parameter."""
    name = parameter.name
    if parameter.kind is Kind.CLOSURE:
        yield f"{name}_token"
        if parameter.optional:
            yield f"{name} is not None" + (" or BOUNCES" if function.filled_later else "")
    elif parameter.kind in (Kind.DATA, Kind.OUTPUT):
        yield pin_variable(function) if reads_synchronously(function) else "pointer"
        yield "size"
        if parameter is function.filled_later:
            yield "state"
    elif parameter.kind is Kind.ADDRESS:
        yield f"{name}_storage"
        yield f"{name}_size"
    else:
        suffix = {Kind.STRING: "_utf8", Kind.PATH: "_bytes", Kind.STRINGS: "_array"}
        yield name + suffix.get(parameter.kind, "")


def failing(function: Function, kind: Returns) -> Iterator[str]:
    """Raise an exception if the call failed, or if a callback or a signal handler raised one.

    An unsigned 64-bit result cannot express a refusal: it is 0 then, and nbdshim_check returns the
    reason.
    """
    failure = f'raise failure_of(self._h, result, "{function.name}")'
    if kind in (Returns.TEXT, Returns.OWNED_TEXT):
        yield "if not result:"
        yield f"    {failure}"
    elif kind is Returns.UNSIGNED:
        check = "nbdshim_check_unlocked" if function.name in LOCK_FREE else "nbdshim_check"
        yield f"if not result and lib.{check}(self._h) < 0:"
        yield f"    {failure.replace('result', f'lib.{check}(self._h)')}"
    else:
        yield "if result < 0:"
        yield f"    {failure}"
    yield "if pending:"
    yield "    raise_pending(self._h)"


def outcome(function: Function, kind: Returns) -> Iterator[str]:
    """Return the result as its Python type."""
    if kind in (Returns.TEXT, Returns.OWNED_TEXT):
        yield f"return {'owned_text' if kind is Returns.OWNED_TEXT else 'as_text'}(result)"
    elif function.form_of:
        yield "if target is not None and (BOUNCES or is_unowned(target)):"
        yield f"    copy_back(target, {pin_variable(function)})"
    elif reads_synchronously(function) and function.buffer:
        finish = "shown_result_of" if function.closures else "result_of"
        yield f"return {finish}({function.buffer.name}, {pin_variable(function)})"
    elif kind is Returns.TRUTH:
        yield "return result != 0"
    elif kind in (Returns.NUMBER, Returns.UNSIGNED):
        yield "return result"
