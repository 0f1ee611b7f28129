#!/bin/bash
# Joins the parts that build.sh wrote from @@{rows}, once all are there. Written by `mirage-launch build-shards`.
@@{options}

@@{environment}
set -euo pipefail
output=@@{output}
@@{command} merge "$output".part-*-of-@@{tasks_padded} --output "$output" --max-rejects @@{max_rejects}
# Their shards live on in the merged folder.
rm -r -- "$output".part-*-of-@@{tasks_padded}
