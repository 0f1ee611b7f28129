#!/bin/bash
# Part SLURM_ARRAY_TASK_ID of the shards of @@{rows}; merge.sh joins the parts. Written by `mirage-launch build-shards`.
@@{options}
#SBATCH --array=0-@@{last}
#SBATCH --requeue                    # a task that lost its node starts again
#SBATCH --open-mode=append

@@{environment}
set -euo pipefail
rows=@@{rows_quoted}
output=@@{output}
# A part is whole or not there; one that an earlier start finished is left as it is.
@@{command} build --input "$rows" --output "$output" --part "$SLURM_ARRAY_TASK_ID/@@{tasks}" @@{limits}
