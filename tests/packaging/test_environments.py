# SPDX-License-Identifier: LGPL-2.0-or-later
"""./run's virtual environments, which commands and threads ask for at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.checkout import CHECKOUT

ASK_TOGETHER = """
import pathlib, sys, threading, time
sys.path.insert(0, sys.argv[1])
import environments

made = []

def must(log, command, failure):
    made.append("venv" in command)
    time.sleep(0.1)
    folder.mkdir(exist_ok=True)

folder = pathlib.Path(sys.argv[2], "environments", "tool")
environments.must = must
ask = (folder, sys.executable, "pip")
threads = [threading.Thread(target=environments.venv, args=ask) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(made.count(True), (folder / "requirements.key").is_file())
"""


def test_an_environment_that_threads_ask_for_at_once_is_made_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ASK_TOGETHER, str(CHECKOUT / "tools"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 True"
