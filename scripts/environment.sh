# Makes .venv at the repository's root and installs what constraints.txt pins, this repository on top.
# Sourced by demo.sh and test.sh; leaves $python, the environment's interpreter, and does nothing the second time.

set -euo pipefail

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repository/.venv
python=$venv/bin/python
stamp=$venv/installed-from # a hash of all that decides what is installed

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

# Runs a command so that a signal to this script ends it too: bash alone would wait for it, or leave it behind.
run() {
    "$@" &
    local child=$! code=0
    trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 130' INT
    trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 143' TERM HUP
    wait "$child" || code=$?
    trap - INT TERM HUP
    return "$code"
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

# $PYTHON if set, else python3, else the newest supported one. Asked by running it: a name may stand for nothing.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if is_supported "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "Python 3.10, 3.11 or 3.12 is needed, and ${PYTHON:-none of python3, python3.12, python3.11, python3.10} is" \
        "one. Set PYTHON to the path of one."
}

fingerprint() {
    cat "$repository"/{constraints.txt,pyproject.toml} "$repository"/hatch_build.py |
        "$1" -c 'import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest(), sys.version.split()[0], sys.argv[1])' "$repository"
}

# Debian's python3 comes without ensurepip; then pip, if it is there, or uv installs from outside.
make_venv() {
    rm -rf "$venv"
    if "$1" -c 'import ensurepip' 2>/dev/null; then
        run "$1" -m venv "$venv"
    elif find_uv "$1"; then
        run "${uv[@]}" venv --quiet --python "$1" "$venv"
    elif "$1" -m pip --version >/dev/null 2>&1; then
        run "$1" -m venv --without-pip "$venv"
    else
        fail "$1 has neither ensurepip nor pip, and there is no uv: install one (Debian: python3-venv)."
    fi
}

# Sets $uv to the command of an installed uv: several times faster than pip, and safe to interrupt.
find_uv() {
    uv=()
    if uv --version >/dev/null 2>&1; then
        uv=(uv)
    elif "$1" -m uv --version >/dev/null 2>&1; then
        uv=("$1" -m uv)
    else
        return 1
    fi
}

install_uv() {
    say "uv is not installed here: installing it into .venv"
    local pins=(--quiet --disable-pip-version-check --constraint "$repository/constraints.txt" uv)
    if "$python" -m pip --version >/dev/null 2>&1; then
        run "$python" -m pip install "${pins[@]}"
    else
        run "$1" -m pip --python "$python" install "${pins[@]}"
    fi
    uv=("$python" -m uv)
}

# uv does not read pip's configuration. On a machine with an index of its own that is where it is named.
use_index_of_pip() {
    local index
    [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}${UV_INDEX:-}${UV_CONFIG_FILE:-}" ] || return 0
    [ ! -e "${XDG_CONFIG_HOME:-$HOME/.config}/uv/uv.toml" ] && [ ! -e /etc/uv/uv.toml ] || return 0
    index=${PIP_INDEX_URL:-$("$1" -m pip config get global.index-url 2>/dev/null || true)}
    [ -z "$index" ] || export UV_DEFAULT_INDEX=$index
}

install_environment() {
    local base wanted
    base=$(find_python)
    wanted=$(fingerprint "$base")
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "installing the engine and this overlay into .venv for $("$base" --version): several GB, once"
    make_venv "$base"
    find_uv "$base" || install_uv "$base"
    use_index_of_pip "$base"
    run "${uv[@]}" pip install --python "$python" \
        --constraint "$repository/constraints.txt" --build-constraint "$repository/constraints.txt" \
        --editable "$repository[test]"
    printf '%s\n' "$wanted" >"$stamp"
}

install_environment
