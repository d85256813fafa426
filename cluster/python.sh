#!/usr/bin/env bash
# Python 3.11 for a Debian or Ubuntu host or image that has none; does nothing where python3.11 is found.
#
# Debian 12 brings it; Ubuntu gets it from the deadsnakes archive (its own 3.11 is a release candidate or absent).
set -euo pipefail
command -v python3.11 >/dev/null && exit 0
command -v apt-get >/dev/null || { echo "python.sh: no python3.11 and no apt-get: install Python 3.11 by hand" >&2; exit 2; }
root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
export DEBIAN_FRONTEND=noninteractive
root apt-get update -q
if ! apt-cache show python3.11-venv >/dev/null 2>&1 || grep -qi '^ID=ubuntu' /etc/os-release; then
  root apt-get install -qy --no-install-recommends software-properties-common
  root add-apt-repository -y ppa:deadsnakes/ppa
  root apt-get update -q
fi
# The compiler and the headers are for mamba-ssm and for Triton's kernels.
root apt-get install -qy --no-install-recommends python3.11 python3.11-venv python3.11-dev build-essential git rsync
