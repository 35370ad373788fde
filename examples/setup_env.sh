#!/usr/bin/env bash
# Make the CPU environment in .venv: the locked packages, the SGLang server and this project, about 500 MB of downloads.
#   bash examples/setup_env.sh
# Run again, it returns at once where nothing changed; after an interruption it starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"                     # interpreter that the environment is made from, 3.11 or newer
VENV="${VENV:-.venv}"                           # folder of the environment
LOCK=requirements/cpu.txt

fail() {
  echo "error: $*" >&2
  exit 2
}

command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.11 or newer, or set PYTHON to one"
version="$("$PYTHON" -V 2>/dev/null)" || fail "$PYTHON does not run; set PYTHON to Python 3.11 or newer"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "Python 3.11 or newer is needed, $PYTHON is $version; set PYTHON to a newer one"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$PYTHON has no venv module; install it (Debian and Ubuntu: python3-venv) or set PYTHON to another one"
[[ -n "${CXX:-}" ]] || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
  fail "no C++ compiler found (c++, g++ or clang++); torch.compile in the SGLang server needs one: install g++ or set CXX"

mkdir -p "$VENV"
exec 9>"$VENV/.setup.lock"
flock 9                                         # two callers at once: the second waits, then finds it done

wanted="$version $(cat "$LOCK" pyproject.toml examples/setup_env.sh | sha256sum)"
stamp="$VENV/.setup.stamp"
unfinished="$VENV/.setup.unfinished"            # there while an installation runs, so also after one was interrupted
if [[ ! -e "$unfinished" && -x "$VENV/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
  exit 0
fi

echo "installing $(grep -vc '^#' "$LOCK") packages and sglang into $VENV ..."
pip=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check)
rm -f "$stamp"
if [[ -e "$unfinished" ]] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  touch "$unfinished"
  rm -rf "$VENV/bin" "$VENV/lib" "$VENV/lib64" "$VENV/include"
  "$PYTHON" -m venv "$VENV"
fi
touch "$unfinished"
"${pip[@]}" -r "$LOCK" || fail "the packages of $LOCK could not be installed (see above); run this again"
"${pip[@]}" --no-deps sglang==0.5.23 || fail "sglang could not be installed (see above); run this again"
"${pip[@]}" --no-deps --no-build-isolation -e . || fail "this project could not be installed (see above)"
rm "$unfinished"
echo "$wanted" >"$stamp"
echo "ready: $VENV/bin/tropd --help"
