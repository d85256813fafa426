#!/usr/bin/env bash
# Makes or completes the Python environment of a node: laptop, CI, cluster image and `ray up` setup command alike.
#
#   cluster/bootstrap.sh [--gpu|--cpu] [--tests] [--venv DIR]
#
# Idempotent: a second run with the same requirement files does nothing. --gpu/--cpu default to what the machine has
# (nvidia-smi answers). PIP_FIND_LINKS, where set, is passed on as uv's --find-links (uv itself ignores that variable): it is
# how local wheels such as a CPU build of torch are found.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv kind='' tests=''
while [ $# -gt 0 ]; do
  case $1 in
    --gpu) kind=gpu ;; --cpu) kind=cpu ;; --tests) tests=1 ;;
    --venv) shift; venv=${1:?--venv needs a directory} ;;
    *) echo "bootstrap.sh: unknown option $1 (known: --gpu --cpu --tests --venv DIR)" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$kind" ] || { if nvidia-smi >/dev/null 2>&1; then kind=gpu; else kind=cpu; fi; }
base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "bootstrap.sh: $("$base" --version 2>&1) found, Python 3.11 needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }

files=("$root/cluster/requirements-$kind.txt")
[ -z "$tests" ] || files+=("$root/tests/requirements.txt")
stamp=$venv/.reid-dist-$kind${tests:+-tests}
digest=$(cat "$root/requirements.txt" "$root/cluster/overrides-cpu.txt" "$root/cluster/torchvision_ops.py" \
             "$root/cluster/bootstrap.sh" "${files[@]}" | sha256sum | cut -d' ' -f1)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ]; then exit 0; fi

# Two jobs of one node may start at once: the second waits and then finds the work done.
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ]; then exit 0; fi

started=$SECONDS
[ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
[ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet uv==0.11.13
# Compiled here and once: where PYTHONDONTWRITEBYTECODE is set, as in most images, each of a job's processes would compile torch and
# Ray anew (3.2 s of CPU for `import torch` instead of 1.5).
options=(--python "$venv/bin/python" --compile-bytecode)
for link in ${PIP_FIND_LINKS:-}; do options+=(--find-links "$link"); done
[ "$kind" = gpu ] || options+=(--override "$root/cluster/overrides-cpu.txt")
# mamba-ssm compiles against the installed torch, so its build must see that torch: torch first, then no isolation for it.
if [ "$kind" = gpu ]; then
  "$venv/bin/uv" pip install "${options[@]}" 'torch==2.13.0' setuptools wheel ninja packaging
  options+=(--no-build-isolation-package mamba-ssm --no-build-isolation-package causal-conv1d)
fi
requirements=()
for file in "${files[@]}"; do requirements+=(-r "$file"); done
"$venv/bin/uv" pip install "${options[@]}" "${requirements[@]}"

# torchvision beside a CPU torch: see cluster/torchvision_ops.py. On a CUDA torch the plain import works and nothing is written.
if ! "$venv/bin/python" -c 'import torchvision' >/dev/null 2>&1; then
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$root/cluster/torchvision_ops.py" "$site/_reid_dist_torchvision_ops.py"
  echo 'import _reid_dist_torchvision_ops' > "$site/_reid_dist_torchvision_ops.pth"
  "$venv/bin/python" -c 'import torchvision' || { echo "bootstrap.sh: torchvision cannot be imported beside this torch" >&2; exit 1; }
fi
echo "$digest" > "$stamp"
echo "bootstrap.sh: $kind environment ready in $((SECONDS - started)) s at $venv" >&2
