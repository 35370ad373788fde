#!/usr/bin/env bash
# Resolve trainer-gpu.in and server-gpu.in into the .txt files beside them, from metadata alone (seconds, no downloads
# of packages):
#   bash requirements/lock.sh            # keeps the versions that are in the .txt files, if they still fit
#   UPGRADE=1 bash requirements/lock.sh  # takes the newest that fit
# Needs uv (pip install uv). In the trainer's environment, what cpu.txt pins has that version, except for torch and what
# depends on its choice. SGLang chooses the server's versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

UV="${UV:-uv}"                                  # program
UPGRADE="${UPGRADE:-0}"                         # 1: newest versions
PYTHON_VERSION=3.11                             # the oldest Python; its lock also fits 3.12
SYSTEM=x86_64-manylinux_2_34                    # glibc 2.34: Debian 12, Ubuntu 22.04, RHEL 9 and newer
export UV_PYTHON_DOWNLOADS=never

shared="$(mktemp)"
trap 'rm -f "$shared"' EXIT
sed -E '/^(#|torch==|triton==|setuptools==)/d; s/ *#.*//' cpu.txt >"$shared"

for name in trainer-gpu server-gpu; do
  options=(--quiet --only-binary :all: --python-version "$PYTHON_VERSION" --python-platform "$SYSTEM")
  options+=(--no-header --annotation-style line)
  [[ "$name" != trainer-gpu ]] || options+=(--constraints "$shared")
  [[ "$UPGRADE" != 1 ]] || options+=(--upgrade)
  new="$name.new.txt"
  cp "$name.txt" "$new" 2>/dev/null || true     # uv keeps the versions that it finds there
  "$UV" pip compile "${options[@]}" "$name.in" -o "$new"
  {
    echo "# Made by requirements/lock.sh from $name.in, which has the reasons. For Python 3.11 and 3.12 on x86_64."
    # "pkg==1  # via a, b, c, d" becomes "pkg==1  # of a, b, c and others"
    sed -E "s| +# via |  # of |; s|,? -c [^ ,]*||g; s|-r ||; s|# of, |# of |
            s|(# of ([^,]+, ){2}[^,]+), .*|\1 and others|" "$new"
  } >"$name.txt"
  rm "$new"
  echo "$name.txt: $(grep -vc '^#' "$name.txt") packages"
done
