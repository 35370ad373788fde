#!/usr/bin/env bash
# Make the environments of this machine:
#   bash examples/setup_env.sh
# Without a GPU, that is .venv: the locked packages, the SGLang server, its router and this project, about 550 MB of
# downloads.
# With a GPU, it is .venv-trainer with this project and .venv-server with SGLang, which need two versions of torch.
# If nothing changed, running it again returns at once. After an interruption, it starts from the beginning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PLATFORM="${PLATFORM:-auto}"                    # cpu, gpu or auto: gpu if the machine has an NVIDIA GPU
PYTHON="${PYTHON:-python3}"                     # interpreter to make the environments from, 3.11 or newer
TRAINER_VENV="${TRAINER_VENV:-.venv-trainer}"   # folder of the trainer's environment on a GPU machine
SERVER_VENV="${SERVER_VENV:-.venv-server}"      # folder of the server's environment on a GPU machine
ONLY="${ONLY:-}"                                # trainer or server: make only that one of the two
FLASH_ATTN="${FLASH_ATTN:-auto}"                # build flash-attn: 0, 1, or auto: if a GPU is older than sm_90
SIGN_EVERY_S="${SIGN_EVERY_S:-15}"              # seconds between two progress lines of a long operation

SGLANG=sglang==0.5.23
CPU_LOCK=requirements/cpu.txt
TRAINER_LOCK=requirements/trainer-gpu.txt
SOURCES=requirements/trainer-gpu-source.txt
SERVER_LOCK=requirements/server-gpu.txt
ROUTER_LOCK=requirements/router.txt

fail() {
  echo "error: $*" >&2
  exit 2
}

has_gpu() {
  nvidia-smi -L >/dev/null 2>&1 || compgen -G "/dev/nvidia[0-9]*" >/dev/null
}
case "$PLATFORM" in
  auto) if has_gpu; then PLATFORM=gpu; else PLATFORM=cpu; fi ;;
  cpu | gpu) ;;
  *) fail "PLATFORM is '$PLATFORM', expected cpu, gpu or auto" ;;
esac
[[ "$ONLY" =~ ^(trainer|server|)$ ]] || fail "ONLY is '$ONLY', expected trainer or server"
[[ "$FLASH_ATTN" =~ ^(0|1|auto)$ ]] || fail "FLASH_ATTN is '$FLASH_ATTN', expected 0, 1 or auto"
[[ "$PLATFORM" == cpu || -z "${VENV:-}" ]] ||
  fail "VENV=$VENV is the environment of a CPU; set TRAINER_VENV and SERVER_VENV, or PLATFORM=cpu"
[[ "$PLATFORM" == gpu || -z "$ONLY" ]] ||
  fail "ONLY=$ONLY: a CPU machine has one environment; unset it or set PLATFORM=gpu"

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
if [[ "$PLATFORM" == gpu ]]; then
  # the locks were resolved for these two; a newer Python has no wheels of some packages
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
    fail "Python 3.11 or 3.12 is needed on a GPU machine, $PYTHON is $version; set PYTHON to one of them"
  [[ -f "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]] ||
    fail "$PYTHON has no Python.h, which builds need; install it (Debian and Ubuntu: python3-dev)"
fi

# If two callers run at once, the second one waits and then finds everything done. take_flock returns 75 if another
# caller has the lock, and another code if there is no flock.
take_flock() {
  command -v flock >/dev/null || return 70
  flock -E 75 "$@" 9 2>/dev/null
}
# The same without flock: a folder, which only one caller can create.
take_folder() {
  local me owner until=$SECONDS
  folder="$VENV/.setup.lock.d"
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
lock() {
  local locked=0
  mkdir -p "$VENV" || fail "cannot write $VENV; set $1 to a place with room and rights"
  exec 9>"$VENV/.setup.lock" || fail "cannot write $VENV; set $1 to a place with room and rights"
  take_flock -n || locked=$?
  while ((locked == 75)); do
    echo "waiting for another set-up in $VENV ..."
    locked=0
    take_flock -w "$SIGN_EVERY_S" || locked=$?
  done
  ((locked == 0)) || take_folder
}

# environment FOLDER VARIABLE INSTALL FILE...: make it with the function INSTALL, unless it was made from the same files
# by the same Python. The body is a subshell: the lock ends with it.
environment() (
  VENV="$1" variable="$2" install="$3"
  shift 3
  lock "$variable"
  wanted="$version $FLASH_ATTN $(cat "$@" examples/setup_env.sh | sha256sum)"
  stamp="$VENV/.setup.stamp"
  unfinished="$VENV/.setup.unfinished"          # exists while an installation runs, and after one was interrupted
  if [[ ! -e "$unfinished" && -x "$VENV/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
    exit 0
  fi
  echo "installing $(grep -vc '^#' "$1") packages of $1 into $VENV, a few minutes ..."
  pip=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check)
  rm -f "$stamp"
  if [[ -e "$unfinished" ]] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    touch "$unfinished"
    rm -rf "$VENV/bin" "$VENV/lib" "$VENV/lib64" "$VENV/include"
    with_signs "making $VENV" "$PYTHON" -m venv "$VENV"
  fi
  touch "$unfinished"
  with_signs "installing packages" "${pip[@]}" -r "$1" ||
    fail "the packages of $1 could not be installed (see above); run this again"
  "$install"
  rm "$unfinished"
  echo "$wanted" >"$stamp"
)

install_project() {
  with_signs "installing this project" "${pip[@]}" --no-deps --no-build-isolation -e . ||
    fail "this project could not be installed (see above)"
}

install_router() {
  with_signs "installing the router" "${pip[@]}" -r "$ROUTER_LOCK" ||
    fail "the packages of $ROUTER_LOCK could not be installed (see above); run this again"
}

install_cpu() {
  with_signs "installing sglang" "${pip[@]}" --no-deps "$SGLANG" ||
    fail "sglang could not be installed (see above); run this again"
  install_router
  install_project
  echo "ready: $VENV/bin/tropd --help"
}

# Whether a GPU of this machine is older than sm_90, so that attention of packed samples needs flash-attn.
older_gpu() {
  local capability
  while read -r capability; do
    [[ ! "$capability" =~ ^[0-9]+\.[0-9]+$ ]] || ((${capability%.*} >= 9)) || return 0
  done < <(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
  return 1
}

# build PACKAGE: build what $SOURCES pins for PACKAGE, with the compiler and headers that came with torch.
build() {
  local pinned bin nvidia
  bin="$(cd "$VENV/bin" && pwd)"
  pinned="$(sed -n "s/^\($1==[^ ]*\).*/\1/p" "$SOURCES")"
  nvidia="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia"
  rm "$unfinished"                              # all packages are there; if the build fails, only it is repeated
  with_signs "building $pinned" env CUDA_HOME="$nvidia/cu13" PATH="$bin:$PATH" \
    CPLUS_INCLUDE_PATH="$nvidia/cudnn/include:$nvidia/nccl/include" \
    NVTE_PYTORCH_FORCE_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=80 \
    "${pip[@]}" --no-deps --no-build-isolation "$pinned" ||
    fail "$pinned could not be built (see above, and $SOURCES); run this again"
  touch "$unfinished"
}

install_trainer() {
  build transformer_engine_torch
  [[ "$FLASH_ATTN" == 0 ]] || build flash-attn
  install_project
  echo "ready, the trainer: $VENV/bin/tropd --help"
}

install_server() {
  local python="$VENV/bin/python"
  [[ "$python" == /* ]] || python="$PWD/$python"
  install_router
  echo "ready, the server: set rollout.server.python=$python in a run (and teacher.server.python, if it has one)"
}

if [[ "$PLATFORM" == cpu ]]; then
  FLASH_ATTN=0
  environment "${VENV:-.venv}" VENV install_cpu "$CPU_LOCK" "$ROUTER_LOCK" pyproject.toml setup.py
  exit
fi
if [[ "$FLASH_ATTN" == auto ]]; then
  if older_gpu; then FLASH_ATTN=1; else FLASH_ATTN=0; fi
fi
[[ "$ONLY" == server ]] ||
  environment "$TRAINER_VENV" TRAINER_VENV install_trainer "$TRAINER_LOCK" "$SOURCES" pyproject.toml setup.py
[[ "$ONLY" == trainer ]] || environment "$SERVER_VENV" SERVER_VENV install_server "$SERVER_LOCK" "$ROUTER_LOCK"
