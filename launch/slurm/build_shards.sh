#!/bin/bash
# Builds part SLURM_ARRAY_TASK_ID of the shards of @@{rows}; merge.sh merges the parts. Written by `mirage-launch build-shards`.
@@{options}
#SBATCH --array=0-@@{last}
#SBATCH --requeue                    # a task that lost its node is restarted
#SBATCH --open-mode=append

@@{environment}
set -euo pipefail
rows=@@{rows_quoted}
output=@@{output}
# A complete part of an earlier start is kept, and an unfinished one continues.
@@{command} build --input "$rows" --output "$output" --part "$SLURM_ARRAY_TASK_ID/@@{tasks}" --workers 1 @@{limits}
