"""Prints as JSON which python, torch, triton and engine an environment has. Run by path, in that environment.

It imports neither torch nor the engine, only the standard library: any contestant's Python can run it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from importlib import metadata


def version(name: str) -> str | None:
    """The version of the package ``name`` that an import would find, or None if there is no such package.

    What stands beside the code comes first: with several folders on PYTHONPATH the environment's metadata can be
    another installation's.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    places = list(spec.submodule_search_locations or [])
    for file in (os.path.join(place, name) for place in places for name in ("_version.py", "version.py")):
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as stream:
                found = re.search(r"^(?:__)?version(?:__)?(?:\s*:.*?)?\s*=\s*['\"]([^'\"]+)", stream.read(), re.M)
            if found:
                return found[1]
    beside = [os.path.dirname(place) for place in places] or sys.path
    for distribution in [*metadata.distributions(name=name, path=beside), *metadata.distributions(name=name)]:
        return str(distribution.version)
    return "unknown"


def overlay_is_laid() -> bool:
    """Whether an ``import sglang`` here would find sglang-minimax's modules first."""
    overlay = sys.modules.get("sglang_minimax.overlay")
    spec = importlib.util.find_spec("sglang")
    return overlay is not None and spec is not None and overlay.folder() in list(spec.submodule_search_locations or [])


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))  # no place to find the engine in
    sys.path[:] = [place for place in sys.path if place != here]
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "triton", "sglang")}}
    print(json.dumps({"versions": versions, "overlay": overlay_is_laid()}))
