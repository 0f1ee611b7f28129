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
part=$(printf '%s.part-%05d-of-%05d' "$output" "$SLURM_ARRAY_TASK_ID" @@{tasks})
# A part is whole or not there; one that is there was finished by an earlier start.
if [ -e "$part" ]; then
    echo "$part is there already"
    exit 0
fi
@@{command} build --input "$rows" --output "$output" --part "$SLURM_ARRAY_TASK_ID/@@{tasks}" @@{limits}
