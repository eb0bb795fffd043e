# shellcheck shell=bash
# Sourced by the batch scripts: one attempt at a run, how it is asked to stop, and whether there is to be another one.
#
# A job is over for one of six reasons, and the files in the run folder say which:
#   DONE is there                                    the run is finished
#   FAILED is there                                  the run cannot succeed as it is: not requeued
#   no DONE, a newer checkpoint, ranks left with 0   it was asked to stop: requeued, at most MAX_REQUEUES times
#   no DONE, a newer checkpoint, ranks failed        requeued in the same way if REQUEUE_ON_FAILURE=1
#   no DONE, a node does not answer                  requeued in the same way, newer checkpoint or not
#   no DONE and no newer checkpoint                  not requeued: the next attempt would come no further
# Exit codes cannot tell: with --kill-on-bad-exit and under torchrun those of the ranks get lost.

MAX_REQUEUES=${MAX_REQUEUES:-20}
REQUEUE_ON_FAILURE=${REQUEUE_ON_FAILURE:-0}

# begin_attempt ARGUMENTS...: sets train_args (for launch/train.py), run_folder, attempt and log (of the ranks).
begin_attempt() {
    # `sbatch slurm/train.sbatch recipe.yaml` says the same as `--config recipe.yaml`.
    if (($#)) && [[ $1 != -* ]]; then set -- --config "$@"; fi
    # --resume comes first, so that your own wins: a restarted job goes on from its newest whole checkpoint.
    train_args=(--resume auto "$@")
    run_folder=$(folder_of "${train_args[@]}")
    if [[ -e $run_folder/DONE ]]; then
        echo "$run_folder is finished. To train on with a larger train.max_steps, remove $run_folder/DONE first."
        exit 0
    fi
    # of an attempt that was killed before it could heed it, and of one whose cause may be mended by now
    rm -f "$run_folder/STOP" "$run_folder/FAILED"
    checkpoint_before=$(newest_checkpoint)
    terminated=0
    attempt=${SLURM_RESTART_COUNT:-0}
    log=logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.$attempt.out
    mkdir -p logs
    echo "$(date '+%F %T') job $SLURM_JOB_ID, attempt $attempt on $SLURM_JOB_NODELIST: $run_folder from checkpoint" \
        "$checkpoint_before, log in $log"
}

# run_attempt COMMAND...: runs it and never returns.
run_attempt() {
    trap ask_to_stop USR1
    trap 'terminated=1' TERM
    # In the background, because bash runs a trap only when the command in the foreground has ended.
    "$@" &
    local step=$! status=0
    # A trapped signal ends `wait` early; the step is over when its process is.
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
    wait "$step" || status=$?
    end_attempt "$status"
}

# Slurm's lead signal comes here (`--signal=B:`), and goes on as a file. srun would send a signal to whole process
# groups, and end launchers and compilers that know nothing of it.
ask_to_stop() {
    echo "$(date '+%F %T') asked to stop"
    mkdir -p "$run_folder"
    touch "$run_folder/STOP"
}

# end_attempt STATUS: ends or requeues the job.
end_attempt() {
    local status=$1 newest
    newest=$(newest_checkpoint)
    echo "$(date '+%F %T') attempt $attempt ended with exit code $status at checkpoint $newest"
    if [[ -e $run_folder/DONE ]]; then
        echo "$run_folder is finished."
        exit 0
    fi
    if ((terminated)); then
        # Slurm is about to end this job (scancel, a requeue, its time). An exit of our own would read as COMPLETED, and
        # a requeue of ours would bring back a job that was cancelled.
        trap '' TERM
        sleep 3600
    fi
    local code=$((status ? status : 1))
    if [[ -e $run_folder/FAILED ]]; then
        echo "The run cannot succeed as it is: $(<"$run_folder/FAILED")"
        exit "$code"
    fi
    if ((status)) && ! nodes_answer; then
        echo "A node does not answer."
    elif ((status)) && ((REQUEUE_ON_FAILURE != 1)); then
        echo "The ranks failed, see $log. They are started again by themselves only with REQUEUE_ON_FAILURE=1."
        exit "$code"
    elif ((newest <= checkpoint_before)); then
        echo "No checkpoint newer than $checkpoint_before has appeared, so another attempt would come no further."
        exit "$code"
    fi
    if ((attempt >= MAX_REQUEUES)); then
        echo "This was the last attempt: MAX_REQUEUES is $MAX_REQUEUES."
        exit "$code"
    fi
    echo "Requeueing job $SLURM_JOB_ID."
    trap - TERM # a requeue ends this script by it
    timeout 60 scontrol requeue "$SLURM_JOB_ID" # the commands of Slurm wait for ever when its controller is down
    sleep 3600
}

# Whether a command can be started on every node of the job. Slurm itself takes minutes to give up a node (SlurmdTimeout),
# and the ranks that are left have failed long before.
nodes_answer() {
    timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true 2>/dev/null
}

# The folder of the run that these arguments of launch/train.py describe.
# shellcheck disable=SC2154  # env.sh names both
folder_of() { "${container[@]}" "$python" launch/train.py "$@" --print_folder; }

# The number of the run's newest checkpoint, 0 where there is none.
newest_checkpoint() {
    local newest=0 folder step
    for folder in "$run_folder"/checkpoint-*; do
        step=${folder##*-}
        if [[ $step =~ ^[0-9]+$ ]] && ((step > newest)); then newest=$step; fi
    done
    echo "$newest"
}
