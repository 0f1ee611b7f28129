#!/bin/bash
# `mirage evaluate` on SLURM, from commit @@{commit}. Written by `mirage-launch evaluate`.
@@{options}
#SBATCH --requeue                    # SLURM may restart it under the same id; it continues
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60           # to this script that many seconds before the limit, or up to a minute earlier

job=@@{job}
parts=@@{parts}
python=@@{python}

# What is answered is kept, so the ranks just end: before the time limit (USR1), and for scancel and SLURM (TERM).
at_limit=0
trap 'at_limit=1; kill -TERM "$step"' USR1
trap 'kill -TERM "$step"' TERM

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
@@{environment}
export PYTHONPATH="$job/code${PYTHONPATH:+:$PYTHONPATH}"   # the code at submission
export PYTHONSAFEPATH=1                                    # not the current folder
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"

batches() { cat "$parts"/rank_*.jsonl 2>/dev/null | wc -l; }
before=$(batches)
srun --export=ALL --kill-on-bad-exit=1 @@{step}-u -m mirage_ds.cli evaluate @@{arguments} &
step=$!
while wait "$step"; code=$?; [ $code -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done  # a signal ends bash's wait

if [ $at_limit = 1 ] && [ $code != 0 ]; then
    if [ "$(batches)" -gt "$before" ]; then
        trap '' TERM   # sent by the requeue
        scontrol requeue "$SLURM_JOB_ID" || echo "error: not requeued; submit again with the same command" >&2
    else
        echo "error: not one batch was answered within the time limit; submit again with a longer --time" >&2
    fi
fi
exit $code
