# SPDX-License-Identifier: LGPL-2.0-or-later
"""nbd.fsspec: random calls do to a disk what they do to bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.servers import Server
from support.sizes import MIB

STEPS = 60
NEAR = (-2 * MIB, -MIB, -513, -1, 0, 1, 511, 512, 65536, MIB - 1, MIB, MIB + 1, 3 * MIB)


def place(rng: random.Random) -> int | None:
    """Return the start or end of a range, which may be negative, None or past the end."""
    return rng.choice([None, rng.choice(NEAR), rng.randrange(-MIB, MIB)])


def step(rng: random.Random, fs: Any, uri: str, model: bytearray) -> None:
    """Make one random call, and compare it with the model."""
    start, end = place(rng), place(rng)
    action = rng.choice(["cat", "ranges", "file", "pipe", "write"])
    if action == "cat":
        assert fs.cat_file(uri, start, end) == model[start:end]
    elif action == "ranges":
        starts, ends = [place(rng) for _ in range(9)], [place(rng) for _ in range(9)]
        got = fs.cat_ranges([uri] * 9, starts, ends)
        assert got == [model[s:e] for s, e in zip(starts, ends)]
    elif action == "file":
        with fs.open(uri) as file:
            file.seek(abs(start or 0))
            assert file.read(abs(end or 0)) == model[abs(start or 0) :][: abs(end or 0)]
    else:
        at = rng.randrange(MIB)
        data = rng.randbytes(rng.choice([1, 512, 70000]))[: MIB - at]
        model[at : at + len(data)] = data
        if action == "pipe":
            fs.pipe_file(uri, data, offset=at)
        else:
            with fs.open(uri, "r+b") as file:
                file.seek(at)
                file.write(data)


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_do_what_they_do_to_bytes(fs: Any, server: Server, seed: int) -> None:
    rng = random.Random(seed)
    model = bytearray(rng.randbytes(MIB))
    fs.pipe_file(server.uri, model)
    for _ in range(STEPS):
        step(rng, fs, server.uri, model)
    assert fs.cat_file(server.uri) == model
