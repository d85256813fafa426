#!/usr/bin/env bash
# One job on a Slurm allocation; `ray symmetric-run` starts Ray on every node, runs the line on the first, and ends Ray with it.
#
#   sbatch --nodes=2 --gpus-per-node=4 cluster/slurm.sh jobs.train comoe/cuhk_pedes data.root=... output=... training.num_workers=8
#
# Submit from the repository root, on a file system that all nodes see, after `cluster/bootstrap.sh --gpu`. Two minutes before the
# time limit, and on a preemption with notice, the job is asked to end with a checkpoint; the same line continues it, and
# --requeue does that by itself.
#SBATCH --job-name=reid-dist
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.log
set -euo pipefail
[ $# -gt 0 ] || { echo "slurm.sh: name the job: sbatch cluster/slurm.sh jobs.train RECIPE key=value ..." >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?run it with sbatch}"
[ -f cluster/env.sh ] || { echo "slurm.sh: submit from the repository root" >&2; exit 2; }
# A token for this job alone, on the shared file system for the length of the job.
state=$PWD/.slurm-$SLURM_JOB_ID
mkdir -p -m 700 "$state"
trap 'rm -rf "$state"' EXIT
(umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$state/token")
export RAY_AUTH_TOKEN_PATH=$state/token REID_STATE=$state RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${first%%$'\n'*}
export REID_HEAD="$first:$((20000 + SLURM_JOB_ID % 20000))"
# RAY_ADDRESS lets the job connect to this Ray instead of starting a private one.
srun --kill-on-bad-exit=1 bash -c '
  . cluster/env.sh
  export RAY_ADDRESS=$REID_HEAD
  exec ray symmetric-run --address "$REID_HEAD" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats -- \
    bash -c "echo \$\$ > \$REID_STATE/pid; exec python -m \"\$@\"" job "$@"
' slurm "$@" &
step=$!
# Slurm would signal every process of a step, the raylets too, and nothing could be saved. So only this script is signalled
# (B:), and hands it on to the job itself, which runs on this, the first, node.
trap 'kill -TERM "$(cat "$state/pid")" 2>/dev/null || kill -TERM $step' USR1 TERM INT
code=0
while wait $step || code=$?; kill -0 $step 2>/dev/null; do code=0; done      # a trapped signal ends `wait` early
exit $code
