#!/usr/bin/env bash
# bash scripts/demo.sh [--tp N] [--dp N] [--ep N] [--model-path CHECKPOINT]
# Shows on this machine that the server answers as transformers does, on a small random checkpoint unless one is named.
# Needs Python 3.10 to 3.12 and a package index; no GPU and no root.
case " $* " in # answered before several GB are installed
*" -h "* | *" --help "*)
    sed -n '2,4s/^# //p' "$0"
    exit
    ;;
esac
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" -m sglang_minimax.demo "$@"
