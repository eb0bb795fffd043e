#!/usr/bin/env bash
# Submits a long run as a chain of jobs with a time limit each: the next goes on where the one before was stopped.
# For sites that forbid requeueing, or where several short jobs come up sooner than a long one.
#
#   slurm/chain.sh 5 --time 04:00:00 --nodes 4 slurm/train.sbatch recipe.yaml --deepspeed ds_configs/zero3.json
#
# The number of jobs comes first; all that follows goes to sbatch. When the run is done before the chain is, the jobs
# that are left end in seconds.

set -euo pipefail

if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: slurm/chain.sh NUMBER_OF_JOBS [sbatch options] slurm/train.sbatch recipe.yaml ..." >&2
    exit 2
fi
length=$1
shift
mkdir -p logs
# A job of a chain does not requeue itself: the next one is there already.
export MAX_REQUEUES=0
after=()
for ((i = 1; i <= length; i++)); do
    # afterany: whatever ended a job (its time, a lost node), the next one goes on from the newest whole checkpoint.
    job=$(sbatch --parsable --no-requeue "${after[@]}" "$@")
    job=${job%%;*} # a federation of clusters adds the cluster's name
    echo "job $i of $length: $job"
    after=(--dependency="afterany:$job")
done
