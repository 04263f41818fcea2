# SPDX-License-Identifier: LGPL-2.0-or-later
"""The module name of libnbd's own shell, for programs with `import nbdsh; nbdsh.shell()`."""

from __future__ import annotations

from nbd.shell import main as shell

__all__ = ["shell"]
