#!/usr/bin/env bash
# Runs the tests in the environment of the demo: bash scripts/test.sh [arguments of pytest].
# Two files at a time, since ranks wait for each other more than they compute; -n 0: one test after the other.
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"
exec "$python" -m pytest --numprocesses 2 --dist loadfile "$@"
