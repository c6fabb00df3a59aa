#!/bin/sh
# One attempt at the pipeline on a machine that may be taken away at any moment: run it again on the next machine, and it goes on.
# Needs $STATE, a folder on a disk that outlives the machine. docs/how-to/cloud.md explains it.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "${STATE:?is not set, so the work would be lost with the machine; set it to a folder on a disk that stays}"
export PIPELIB_STATE_DIR="$STATE/pipelib"
.venv/bin/dvc config --local cache.dir "$STATE/cache"

# Before a machine is taken away, this process gets SIGTERM and some time, and a container ends with it. Every process of the
# pipeline must get the signal, and the training saves the step that it is at. DVC would die of it, so DVC ignores it and waits.
setsid sh -c 'trap "" TERM; exec .venv/bin/dvc repro' &
pipeline=$!
trap 'kill -s TERM -- "-$pipeline"' TERM
status=0
wait "$pipeline" || status=$?
while kill -0 "$pipeline" 2>/dev/null; do  # the trap has ended the wait
    status=0
    wait "$pipeline" || status=$?
done

# What git and DVC have to know of the results, for a clone that stays: docs/how-to/cloud.md
cp -r dvc.lock metrics "$STATE/"
exit "$status"
