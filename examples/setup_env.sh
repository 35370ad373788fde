#!/usr/bin/env bash
# Make the CPU environment in .venv: the locked packages, the SGLang server and this project, about 500 MB of downloads.
#   bash examples/setup_env.sh
# If nothing changed, running it again returns at once. After an interruption, it starts from the beginning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"                     # interpreter to make the environment from, 3.11 or newer
VENV="${VENV:-.venv}"                           # folder of the environment
LOCK=requirements/cpu.txt

SIGN_EVERY_S="${SIGN_EVERY_S:-15}"              # seconds between two progress lines of a long operation

fail() {
  echo "error: $*" >&2
  exit 2
}

# Run a command. Every few seconds print that it still runs, until it or this script ends.
with_signs() {
  local what="$1" begun=$SECONDS signs status=0 never
  shift
  (
    exec {never}<> <(:)                         # never receives anything: a pause without another process
    while ! read -r -t "$SIGN_EVERY_S" -u "$never" && kill -0 "$$" 2>/dev/null; do
      echo "$what: $((SECONDS - begun)) s so far, $(du -sm "$VENV" 2>/dev/null | cut -f 1) MB in $VENV"
    done
  ) 9>&- &
  signs=$!
  "$@" || status=$?
  kill "$signs" 2>/dev/null || true
  wait "$signs" 2>/dev/null || true
  return "$status"
}

command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.11 or newer, or set PYTHON to one"
version="$("$PYTHON" -V 2>/dev/null)" || fail "$PYTHON does not run; set PYTHON to Python 3.11 or newer"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "Python 3.11 or newer is needed, $PYTHON is $version; set PYTHON to a newer one"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$PYTHON has no venv module; install it (Debian and Ubuntu: python3-venv) or set PYTHON to another one"
[[ -n "${CXX:-}" ]] || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
  fail "no C++ compiler found (c++, g++ or clang++); torch.compile in the SGLang server needs one: install g++ or set CXX"

mkdir -p "$VENV" || fail "cannot write $VENV; set VENV to a place with room and rights"
exec 9>"$VENV/.setup.lock" || fail "cannot write $VENV; set VENV to a place with room and rights"

# If two callers run at once, the second one waits and then finds everything done. take_flock returns 75 if another
# caller has the lock, and another code if there is no flock.
take_flock() {
  command -v flock >/dev/null || return 70
  flock -E 75 "$@" 9 2>/dev/null
}
# The same without flock: a folder, which only one caller can create.
folder="$VENV/.setup.lock.d"
take_folder() {
  local me owner until=$SECONDS
  me="$(uname -n) $$"
  until mkdir "$folder" 2>/dev/null; do
    owner="$(cat "$folder/owner" 2>/dev/null || true)"
    if [[ "${owner% *}" == "${me% *}" ]] && ! kill -0 "${owner##* }" 2>/dev/null; then
      rm -rf "$folder"                          # its owner ran on this machine and has ended
    elif ((SECONDS >= until)); then
      echo "waiting for another set-up in $VENV (${owner:-just begun}; if it is gone, remove $folder) ..."
      until=$((SECONDS + SIGN_EVERY_S))
    fi
    sleep 0.5
  done
  trap 'rm -rf "$folder"' EXIT
  echo "$me" >"$folder/owner"
}
locked=0
take_flock -n || locked=$?
while ((locked == 75)); do
  echo "waiting for another set-up in $VENV ..."
  locked=0
  take_flock -w "$SIGN_EVERY_S" || locked=$?
done
((locked == 0)) || take_folder

wanted="$version $(cat "$LOCK" pyproject.toml setup.py examples/setup_env.sh | sha256sum)"
stamp="$VENV/.setup.stamp"
unfinished="$VENV/.setup.unfinished"            # exists while an installation runs, and after one was interrupted
if [[ ! -e "$unfinished" && -x "$VENV/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
  exit 0
fi

echo "installing $(grep -vc '^#' "$LOCK") packages and sglang into $VENV, a few minutes ..."
pip=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check)
rm -f "$stamp"
if [[ -e "$unfinished" ]] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  touch "$unfinished"
  rm -rf "$VENV/bin" "$VENV/lib" "$VENV/lib64" "$VENV/include"
  with_signs "making $VENV" "$PYTHON" -m venv "$VENV"
fi
touch "$unfinished"
with_signs "installing packages" "${pip[@]}" -r "$LOCK" ||
  fail "the packages of $LOCK could not be installed (see above); run this again"
with_signs "installing sglang" "${pip[@]}" --no-deps sglang==0.5.23 ||
  fail "sglang could not be installed (see above); run this again"
with_signs "installing this project" "${pip[@]}" --no-deps --no-build-isolation -e . ||
  fail "this project could not be installed (see above)"
rm "$unfinished"
echo "$wanted" >"$stamp"
echo "ready: $VENV/bin/tropd --help"
