"""``python -m sglang_minimax``: the same as the command ``sglang-minimax``."""

import sys

from sglang_minimax.cli import main

if __name__ == "__main__":
    sys.exit(main())
