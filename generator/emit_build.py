# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write build.py: the mode of cffi, and the version of libnbd that the build found."""

from __future__ import annotations

from generator.text import banner

BANNER = banner(__name__)


def build_module(mode: str, version: str) -> str:
    """The text of build.py."""
    return (
        f'{BANNER}"""What this build of the package is."""\n\n'
        f'MODE = "{mode}"\nLIBNBD = "{version}"\n'
    )
