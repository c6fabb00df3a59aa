"""The sources of text, one file for each value of `download.source`. Only the chosen one is imported.

Each file has a function `source(params)` that returns a `raw.Source`. A new file here is a new source. It does not re-run
any stage of users of the other sources.
"""
