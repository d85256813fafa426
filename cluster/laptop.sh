#!/usr/bin/env bash
# A head without CPUs in the foreground whose autoscaler starts worker raylets on this machine (cluster/laptop.yaml).
#
#   cluster/laptop.sh [CONFIG]           REID_HEAD_PORT (6379), REID_DASHBOARD_PORT (8265), REID_RAY_FOLDER (a fresh one)
#
# Ctrl-C or SIGTERM ends the head and its workers; other Ray processes of the machine are left alone (no `ray stop`). The
# token is ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH, made where there is none; submit with the same.
set -euo pipefail
cluster=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$cluster/env.sh"
config=${1:-$cluster/laptop.yaml} port=${REID_HEAD_PORT:-6379} dashboard=${REID_DASHBOARD_PORT:-8265}
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
  (umask 077; python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
fi
folder=${REID_RAY_FOLDER:-$(mktemp -d /tmp/reid-laptop-XXXXXX)}
mkdir -p "$folder"
# The provider knows the head by this id and finds it by its address; a node without instance id counts as none of its own, and
# while the head is none the autoscaler starts nothing.
head_id=$(sed -n 's/^ *head_node_id: *//p' "$config")
sed "s|^  launch_multiple: true|&\n  gcs_address: 127.0.0.1:$port|" "$config" > "$folder/autoscaling.yaml"
# The autoscaler imports cluster/laptop_provider.py. The working directory of a job comes before this checkout on its path.
export PYTHONPATH="$(dirname "$cluster")${PYTHONPATH:+:$PYTHONPATH}"
export RAY_FAKE_CLUSTER=1 RAY_OVERRIDE_NODE_ID_FOR_TESTING="$head_id" RAY_CLOUD_INSTANCE_ID="$head_id" \
  RAY_enable_autoscaler_v2=1 AUTOSCALER_UPDATE_INTERVAL_S="${AUTOSCALER_UPDATE_INTERVAL_S:-2}"
echo "laptop.sh: submit with RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-} and" \
     "\`ray job submit --address http://127.0.0.1:$dashboard --working-dir . -- ...\`" >&2
ray start --head --block --num-cpus=0 --node-ip-address=127.0.0.1 --port="$port" --temp-dir="$folder" \
  --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --ray-client-server-port="${REID_CLIENT_PORT:-10001}" \
  --dashboard-agent-listen-port="${REID_AGENT_PORT:-52365}" --object-store-memory=300000000 --disable-usage-stats \
  --autoscaling-config="$folder/autoscaling.yaml" &
head=$!
trap 'kill -TERM $head 2>/dev/null' INT TERM
while kill -0 $head 2>/dev/null; do wait $head || true; done      # a trapped signal ends `wait` early
# Without its head a worker's raylet looks for it for another minute, SIGTERM or not, and its agents for longer.
pkill -KILL -f "site-packages/ray/.*$folder/session_" || true
[ -n "${REID_RAY_FOLDER:-}" ] || rm -rf "$folder"
