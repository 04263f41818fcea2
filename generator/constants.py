# SPDX-License-Identifier: LGPL-2.0-or-later
"""Compute the values of the macros that are constants of libnbd."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from pycparser import c_ast, c_generator, c_parser

from generator.model import Unbindable
from generator.preprocess import PRELUDE

#: The operators of two operands that the expression of a constant may use.
OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "|": operator.or_,
    "&": operator.and_,
    "^": operator.xor,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}

#: The operators of one operand.
SIGNS: Mapping[str, Callable[[int], int]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.inv,
}


def is_constant(name: str) -> bool:
    """Whether a macro is a constant of the API, not a feature test or a compiler attribute."""
    private = ("LIBNBD_HAVE_", "LIBNBD_GCC_", "LIBNBD_ATTRIBUTE_")
    return name.startswith("LIBNBD_") and not name.startswith(private)


def evaluate(name: str, defined: Mapping[str, str]) -> int | str:
    """The value of a macro, which may use other macros.

    Raises:
        Unbindable: The macro is not a constant expression, or uses an unsupported operator.
    """
    text = defined[name]
    # The macro itself is left out, so that a self-reference is an error and not an endless loop.
    others = {other: value for other, value in defined.items() if other != name}
    try:
        tree = c_parser.CParser().parse(f"{PRELUDE}int value = {text};", filename="constant")
    except Exception as reason:  # pycparser's ParseError has moved between its versions
        raise Unbindable(f"{text} is not an expression: {reason}") from None
    return fold(tree.ext[-1].init, others)


def fold(node: c_ast.Node, defined: Mapping[str, str]) -> int | str:
    """The value of a parsed constant expression; recursive in its operands."""
    if isinstance(node, c_ast.Constant):
        return fold_literal(node)
    if isinstance(node, c_ast.ID) and node.name in defined:
        return evaluate(node.name, defined)
    if isinstance(node, c_ast.Cast):
        return fold(node.expr, defined)
    if isinstance(node, c_ast.UnaryOp) and node.op in SIGNS:
        inner = fold(node.expr, defined)
        if isinstance(inner, int):
            return SIGNS[node.op](inner)
    if isinstance(node, c_ast.BinaryOp) and node.op in OPERATORS:
        left, right = fold(node.left, defined), fold(node.right, defined)
        if isinstance(left, int) and isinstance(right, int):
            return OPERATORS[node.op](left, right)
    raise Unbindable(f"no rule for the value {c_generator.CGenerator().visit(node)}")


def fold_literal(node: c_ast.Constant) -> int | str:
    """The value of a string, or of an integer, which may be octal or have a suffix like ULL."""
    text: str = node.value
    if node.type == "string" and "\\" not in text:
        return text.replace('"', "")
    digits = text.rstrip("uUlL")
    if digits.isdigit() and digits.startswith("0"):
        return int(digits, 8)
    try:
        return int(digits, 0)
    except ValueError:
        raise Unbindable(f"no rule for the value {text}") from None
