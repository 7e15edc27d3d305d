#!/bin/sh
# Makes the virtual environment $VENV with $PYTHON and puts the locked tools and rdev into it.
# Called by `make setup`; needs no terminal and no root. Says what is missing in one line.
set -eu

fail() {
    echo "setup: $*" >&2
    exit 1
}

has() {
    "$PYTHON" -c "import $1" 2>/dev/null
}

command -v "$PYTHON" >/dev/null 2>&1 || fail "$PYTHON was not found; set PYTHON=/path/to/python3.11 or newer"
found=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$PYTHON does not run"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "rdev needs Python 3.11 or newer, $PYTHON is $found; set PYTHON=/path/to/a/newer/python3"
has venv || fail "this Python has no venv module; install it (Debian: apt-get install python3-venv)"

[ ! -e "$VENV" ] || [ -e "$VENV/pyvenv.cfg" ] || fail "$VENV exists and is no virtual environment"

echo "setup: the locked dependencies go into $VENV (Python $found; once, about a minute)"
rm -rf "$VENV"
if has ensurepip; then
    "$PYTHON" -m venv "$VENV"
    pip() { "$VENV/bin/python" -m pip "$@"; }
elif "$PYTHON" -m pip --python "$PYTHON" --version >/dev/null 2>&1; then
    # Debian without python3-venv: a pip outside can fill an environment that has none.
    "$PYTHON" -m venv --without-pip "$VENV"
    pip() { "$PYTHON" -m pip --python "$VENV/bin/python" "$@"; }
else
    fail "this Python has neither ensurepip nor pip; install one (Debian: apt-get install python3-venv)"
fi

pip install --quiet --require-hashes -r requirements/dev.txt
# The build backend is in the lock: nothing is fetched here.
pip install --quiet --no-deps --no-build-isolation -e .
