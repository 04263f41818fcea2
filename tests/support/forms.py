"""The two forms of a test: short in every run of the suite, long under `./run soak`."""

from __future__ import annotations

import os

SOAK = os.environ.get("NBD_SOAK") == "1"
