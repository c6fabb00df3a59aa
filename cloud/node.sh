#!/bin/sh
# One machine of several in a training: cloud/node.sh NUMBER, in a fresh clone of the same commit on each. Number 0 runs the pipeline as
# cloud/run.sh does, the others join its training. If one has failed, run it again there, and it goes on.
# Needs $STATE, a folder that all of them see, $PIPELIB_NNODES, and $PIPELIB_RDZV_ENDPOINT, HOST:PORT of number 0.
# docs/how-to/several-machines.md explains it.
set -eu
cd "$(dirname "$0")/.."
checkout="${STATE:?is not set, so the machines could not share data and checkpoints; set it to a folder that all of them see}/checkout"

if [ "$1" = 0 ]; then
    # The others read data/, so the clone moves to the shared folder. What an earlier attempt has left there comes back from the state.
    rm -rf "$checkout"
    mkdir -p "$checkout"
    tar --create --exclude=./.venv . | tar --extract --directory="$checkout"
    ln -s "$PWD/.venv" "$checkout/.venv"
    exec "$checkout/cloud/run.sh"
fi
rm -f data  # which refuses a folder
ln -s "$checkout/data" data
export PIPELIB_STATE_DIR="$STATE/pipelib"
exec .venv/bin/python -m stages.train --join
