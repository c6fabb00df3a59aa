"""The checkout: its paths, stages, work in progress, locks and code, and what git and DVC record about it."""
