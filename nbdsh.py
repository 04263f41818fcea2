# SPDX-License-Identifier: LGPL-2.0-or-later
"""The name under which libnbd's own shell is imported: `import nbdsh; nbdsh.shell()`."""

from __future__ import annotations

from nbd.shell import main as shell

__all__ = ["shell"]
