# SPDX-License-Identifier: LGPL-2.0-or-later
"""_build.py: the mode of the build, and the version of libnbd it was made for."""

from __future__ import annotations

from generator.text import banner

BANNER = banner(__name__)


def build_module(mode: str, version: str) -> str:
    """_build.py."""
    return (
        f'{BANNER}"""What this build of the package is."""\n\n'
        f'MODE = "{mode}"\nLIBNBD = "{version}"\n'
    )
