"""Print how much of the package is documented; run it with a Python that has the package.

python tests/support/docstring_figures.py
"""

from __future__ import annotations

import doctest
import inspect
import platform
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import nbd


def public_methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the names and functions of a class's public methods."""
    for name in dir(cls):
        if not name.startswith("_") and callable(getattr(cls, name)):
            yield name, getattr(cls, name)


def documentation(thing: object) -> str:
    """Return a docstring as help() shows it, without one inherited from object."""
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def has_example(text: str) -> bool:
    """Return whether a docstring has an example that doctest can run."""
    return bool(doctest.DocTestParser().get_examples(text))


def main() -> None:
    """Print the figures."""
    texts = {name: documentation(method) for name, method in public_methods(nbd.NBD)}
    lengths = {name: len(text) for name, text in texts.items()}
    shortest = min(lengths, key=lambda name: lengths[name])
    print(
        f"{platform.python_implementation()} {platform.python_version()}, libnbd {nbd.__version__}"
    )
    print(f"methods of nbd.NBD:   {len(texts)}")
    print(f"documented:           {sum(bool(text) for text in texts.values())}")
    print(f"with an example:      {sum(map(has_example, texts.values()))}")
    print(f"mean length:          {mean(lengths.values()):.0f} characters")
    print(f"minimum length:       {lengths[shortest]} characters ({shortest})")


if __name__ == "__main__":
    main()
