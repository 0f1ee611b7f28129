#!/bin/bash
# @@{recipe} on SLURM, from commit @@{commit}. Written by `mirage-launch slurm`.
# One log for all starts; RUN/jobs/N/attempts.jsonl records how each of them ended.
@@{options}
#SBATCH --requeue                    # SLURM may restart it under the same id
#SBATCH --open-mode=append
#SBATCH --signal=@@{warning}         # USR1 to this script that many seconds before the limit, or up to a minute earlier

job=@@{job}
python=@@{python}

# Before the time limit (USR1) the ranks save and end. TERM comes from scancel, a requeue or a preemption.
terminated=() signalled=0
trap 'signalled=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'signalled=1; terminated=(--terminated)' TERM

# The ranks get the environment of the submission and what is set here.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# A killed build leaves its lock behind, so torch compiles in a new folder at each start.
cache=@@{local_disk}/mirage_ds-$(id -un)
export TRITON_CACHE_DIR="$cache/triton" TORCH_EXTENSIONS_DIR="$cache/torch_extensions-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
@@{environment}
export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}"   # the code at submission
export PYTHONSAFEPATH=1                                    # not the current folder
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
env | grep -E '^(MASTER_|OMP_|NCCL_|UCX_|TORCH|TRITON|CUDA|DS_|HF_|PYTHON|PYTORCH_)' | grep -vE '^[^=]*(TOKEN|KEY)' | sort

# Runs a step of srun and sets $code to its exit code. A signal ends bash's wait, not the step. A step that cannot start
# within two minutes fails: SLURM may have taken a node out of the allocation, and srun would wait until the time limit.
run_step() {
    srun --export=ALL --immediate=120 "$@" &
    while signalled=0; wait $!; code=$?; [ $code -gt 128 ] && [ $signalled = 1 ]; do :; done
}

# launch/slurm/attempts.py decides between two starts.
next=$("$python" -m launch.slurm.attempts begin "$job") || exit 1
if [ "$next" = run ]; then
    # One task on each node checks the inputs, for ten minutes at most; then every rank trains.
    run_step --time=10 --ntasks-per-node=1 --ntasks="$SLURM_NNODES" @@{step}-m launch.slurm.node_check "$job"
    [ $code -ne 0 ] || run_step --kill-on-bad-exit=1 @@{step}-u -m mirage_ds.train "$job/recipe.yaml"
    next=$("$python" -m launch.slurm.attempts end "$job" --code "$code" "${terminated[@]}") || exit 1
fi

# Retries for a minute if SLURM does not answer. Never after TERM: that would restart a job that its user cancelled. And
# never if SLURM itself has requeued the job because it lost this node for a while.
if [[ $next = requeue* ]]; then
    for wait_s in 10 20 30 ""; do
        [ ${#terminated[@]} = 0 ] || break
        if shown=$(scontrol --oneliner show job "$SLURM_JOB_ID"); then
            [[ $shown = *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || break
            if scontrol requeue "$SLURM_JOB_ID"; then
                trap '' TERM   # sent by the requeue
                exclude=${next#requeue}
                # SLURM accepts this change only for a job that is not running, as now.
                [ -z "$exclude" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${exclude# }"
                break
            fi
        fi
        [ -n "$wait_s" ] || { echo "error: SLURM did not requeue the job; submit again with the same command" >&2; exit 1; }
        sleep "$wait_s"
    done
fi
exit "${code:-1}"
