# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write constants.py: the constants of libnbd.h."""

from __future__ import annotations

from generator.model import Header
from generator.text import banner

BANNER = banner(__name__)


def constants_module(header: Header) -> str:
    """The text of constants.py."""
    names = "".join(f'    "{name}",\n' for name, _ in header.constants)
    lines = [f'{BANNER}"""The constants of libnbd.h, without the prefix LIBNBD_."""\n']
    lines += ["from __future__ import annotations\n", f"__all__ = [\n{names}]\n"]
    lines += [f"{name} = {literal(value)}" for name, value in header.constants]
    return "\n".join(lines) + "\n"


def literal(value: int | str) -> str:
    """The value of a constant as a Python literal."""
    return str(value) if isinstance(value, int) else f'"{value}"'
