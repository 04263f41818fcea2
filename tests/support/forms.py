"""The two forms of a test: the suite runs the short form, `./run soak` the long one."""

from __future__ import annotations

import os

SOAK = os.environ.get("NBD_SOAK") == "1"
