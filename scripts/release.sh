#!/usr/bin/env bash
# Builds a release from the tagged commit and serves from it: bash scripts/release.sh
# Leaves wheel and sdist in dist/release. Needs what scripts/test.sh needs, and git.
set -euo pipefail

cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
out=dist/release

refuse() {
    printf 'no release: %s\n' "$@" >&2
    exit 1
}

changes=$(git status --porcelain)
[ -z "$changes" ] || refuse "the working tree is not clean; commit or put away:" "$changes"

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' python/sglang_minimax/__init__.py)
[ -n "$version" ] || refuse "python/sglang_minimax/__init__.py has no line __version__ = \"...\""

newest=$(sed -n '/^## /{s/^## //p;q;}' CHANGELOG.md)
case $newest in
"$version, "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]) ;;
*) refuse "the newest entry of CHANGELOG.md is '$newest' and the version is $version: it must be '## $version, YYYY-MM-DD'" ;;
esac

tags=$(git tag --points-at HEAD)
grep -qxF "v$version" <<<"$tags" ||
    refuse "HEAD has the tags '${tags//$'\n'/ }' and the version is $version: git tag v$version"

source scripts/environment.sh # leaves $python

rm -rf "$out"
build=("$python" -m uv build --quiet --build-constraints constraints.txt)
"${build[@]}" --out-dir "$out" # the sdist, and from it the wheel
from_tree=$(mktemp -d)
trap 'rm -rf "$from_tree"' EXIT
"${build[@]}" --wheel --out-dir "$from_tree"

# Whoever builds from the sdist must get what is tested here: nothing may be missing in it.
"$python" - "$out"/*.whl "$from_tree"/*.whl <<'PYTHON'
import sys, zipfile

def content(wheel):
    with zipfile.ZipFile(wheel) as files:
        return {name: files.read(name) for name in files.namelist()}

from_sdist, from_tree = map(content, sys.argv[1:])
differ = sorted(name for name in from_sdist | from_tree if from_sdist.get(name) != from_tree.get(name))
if differ:
    sys.exit(f"no release: the wheel from the sdist and the one from the tree differ in {', '.join(differ)}")
PYTHON

SGLANG_MINIMAX_WHEEL=$(echo "$PWD/$out"/*.whl) "$python" -m pytest test/release/test_wheel.py
printf 'released into %s:\n' "$out"
ls -l "$out"
