# SPDX-License-Identifier: LGPL-2.0-or-later
"""`python -m nbd` is nbdsh."""

from __future__ import annotations

import os
import sys


def _leave_this_folder() -> None:
    """Remove the current folder from sys.path, where python -m has put it.

    nbd.shell must not import from there.  It adds the folder again for the user's commands.
    """
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        try:
            here = os.getcwd()
        except OSError:  # it was removed
            return
        if sys.path[:1] == [here]:
            del sys.path[0]


_leave_this_folder()

from nbd.shell import main  # noqa: E402

main()
