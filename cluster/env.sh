# Sourced before every `ray start` of every launcher, in the images and by jobs on a node: one place for what a node's processes need.
#
# Places differ, values do not: REID_VENV (environment made by bootstrap.sh) and RAY_AUTH_TOKEN_PATH may be set before.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="${REID_VENV:-$here/.venv}/bin:$PATH"
# Said explicitly: Ray turns token authentication on by itself only where it finds a token file.
export RAY_AUTH_MODE=token
[ -n "${RAY_AUTH_TOKEN:-}" ] || export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
# `ray job stop` waits so long for the checkpoint that a training job makes when it is asked to end (Ray's default is 3 s).
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-60}"
export RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_V2_ENABLED=1
# A spot GPU node may take minutes to come; Ray Train gives a worker group 60 s otherwise.
export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="${RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S:-600}"
# gloo binds 127.0.0.1 where a host's name resolves to it and then fails with "connectFullMesh": name the interface that
# carries the host's first address. NCCL finds its own.
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then
  address=$(hostname -I 2>/dev/null | cut -d' ' -f1)
  interface=$(ip -o -4 addr show 2>/dev/null | awk -v ip="$address" 'index($4, ip "/") == 1 { print $2; exit }')
  [ -z "$interface" ] || export GLOO_SOCKET_IFNAME="$interface"
fi
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
