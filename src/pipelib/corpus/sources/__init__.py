"""Where text comes from, one file for each value of `download.source`; the chosen one alone is loaded.

Each file has a function `source(params)` that returns a `raw.Source`. A new file here is a new source, and changes nothing
for those who use another one.
"""
