#!/bin/bash
# @@{recipe} on SLURM, from commit @@{commit}. Written by `mirage-launch slurm`.
# One log for all starts; RUN/jobs/N/attempts.jsonl says how each of them ended.
@@{options}
#SBATCH --requeue                    # SLURM may start it again, under the same id
#SBATCH --open-mode=append
#SBATCH --signal=@@{warning}         # warns this script so many seconds before the time limit, or a minute earlier

job=@@{job}
python=@@{python}

# Before the time limit (USR1) the ranks are asked to save and end. TERM is scancel's, or SLURM takes the nodes back.
terminated=() signalled=0
trap 'signalled=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'signalled=1; terminated=(--terminated)' TERM

# The ranks get what was set at submission and what is set here.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# A build that was killed leaves a lock for ever: what torch compiles goes to a new folder at each start.
cache=@@{local_disk}/mirage_ds-$(id -un)
export TRITON_CACHE_DIR="$cache/triton"
export TORCH_EXTENSIONS_DIR="$cache/torch_extensions-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
@@{environment}
export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}"   # the code as it was at submission
export PYTHONSAFEPATH=1                                    # and not what lies in the current folder
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
env | grep -E '^(MASTER_|OMP_|NCCL_|UCX_|TORCH|TRITON|CUDA|DS_|HF_|PYTHON)' | grep -vE '^[^=]*(TOKEN|KEY)' | sort

# Runs a step of srun and leaves its exit code in $code. A signal ends bash's wait, not the step.
run_step() {
    srun --export=ALL "$@" &
    while signalled=0; wait $!; code=$?; [ $code -gt 128 ] && [ $signalled = 1 ]; do :; done
}

# What is decided between two starts: launch/attempts.py.
next=$("$python" -m launch.slurm.attempts begin "$job") || exit 1
if [ "$next" = run ]; then
    # One task on each node looks for the shards, ten minutes at most; then every rank trains.
    run_step --time=10 --ntasks-per-node=1 --ntasks="$SLURM_NNODES" @@{step}-m launch.slurm.node_check "$job"
    [ $code -ne 0 ] || run_step --kill-on-bad-exit=1 @@{step}-u -m mirage_ds.train "$job/recipe.yaml"
    next=$("$python" -m launch.slurm.attempts end "$job" --code "$code" "${terminated[@]}") || exit 1
fi

# Asks again for a minute if SLURM does not answer. Never after TERM: it would revive a job that its user cancelled; and
# never once SLURM itself, having lost this node for a while, has requeued the job.
if [[ $next = requeue* ]]; then
    for wait_s in 10 20 30 ""; do
        [ ${#terminated[@]} = 0 ] || break
        if shown=$(scontrol --oneliner show job "$SLURM_JOB_ID"); then
            [[ $shown = *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || break
            if scontrol requeue "$SLURM_JOB_ID"; then
                trap '' TERM   # the requeue's own
                exclude=${next#requeue}
                # SLURM changes this of a job only once it no longer runs, which is now.
                [ -z "$exclude" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${exclude# }"
                break
            fi
        fi
        [ -n "$wait_s" ] || { echo "error: SLURM did not requeue; submit again with the same command" >&2; exit 1; }
        sleep "$wait_s"
    done
fi
exit "${code:-1}"
