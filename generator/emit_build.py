# SPDX-License-Identifier: LGPL-2.0-or-later
"""Write build.py: the cffi mode, the version of libnbd, and whether libnbd is in the wheel."""

from __future__ import annotations

from generator.text import banner

BANNER = banner(__name__)


def build_module(mode: str, version: str, bundled: bool) -> str:
    """The text of build.py."""
    return (
        f'{BANNER}"""What this build of the package is."""\n\n'
        f'MODE = "{mode}"\nLIBNBD = "{version}"\nBUNDLED = {bundled}\n'
    )
