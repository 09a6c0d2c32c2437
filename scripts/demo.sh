#!/usr/bin/env bash
# Shows on this machine that the server answers as the reference does: bash scripts/demo.sh [--tp N] [--dp N]
# [--ep N] [--model-path CHECKPOINT]. Needs Python 3.10 to 3.12 and a package index; no GPU and no root.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" -m sglang_minimax.demo "$@"
