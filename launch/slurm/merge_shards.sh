#!/bin/bash
# Merges the parts that build.sh wrote from @@{rows}. Written by `mirage-launch build-shards`.
@@{options}

@@{environment}
set -euo pipefail
output=@@{output}
@@{command} merge "$output".part-*-of-@@{tasks_padded} --output "$output" --max-rejects @@{max_rejects}
# The merged folder has their shards.
rm -r -- "$output".part-*-of-@@{tasks_padded}
