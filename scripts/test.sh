#!/usr/bin/env bash
# Runs the tests in the environment of the demo: bash scripts/test.sh [arguments of pytest].
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"
exec "$python" -m pytest "$@"
