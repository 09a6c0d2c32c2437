"""Prints the outcomes of test_reference.py as a table for docs/proof.md.

SGLANG_MINIMAX_TEST_LOGS=FOLDER python -m pytest test/gpu/test_reference.py
python test/gpu/table.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = "| server | model | first token right | same 16 tokens | 90% of differences within | allowed | largest |"


def rows(outcomes: list[dict[str, Any]]) -> Iterator[str]:
    yield HEADER
    yield "|".join(["", *[" --- "] * (HEADER.count("|") - 1), ""])
    for one in sorted(outcomes, key=lambda one: (one["stock"], one["nodes"], one["name"])):
        if "failed" in one:
            yield f"| {one['name']} | {one['model']} | does not serve: ends with an error | | | | |"
            continue
        yield (
            f"| {one['name']} | {one['model']} | {one['first token right']} of {one['of']} | {one['same tokens']} "
            f"| {one['90% of differences within']:.3f} | {one['tolerance']:.3f} | {one['largest']:.2f} |"
        )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print("\n".join(rows([json.loads(path.read_text()) for path in folder.glob("*.json")])))
