"""The parameters of the families, one file for each value of `model.architecture`. Only the chosen one is imported.

Each file has `PARAMS`, a frozen dataclass derived from `ModelParams`, and `SECTION`, the same with `init_from`, for params.yaml.
No file here imports torch, since every stage reads all of params.yaml before it knows whether it has work to do.
"""
