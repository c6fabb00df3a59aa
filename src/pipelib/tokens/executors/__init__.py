"""Who encodes the missing units, one file for each value of `$PIPELIB_EXECUTOR`. Only the chosen one is imported.

Each file has a function `encode(task)` that follows `pipelib.tokens.encoding.Executor`. Units are the same for all of them,
and so are the shards: an executor is a way to use more machines, so the environment chooses it and no parameter does. A new
file here is a new executor. It re-runs no stage.
"""
