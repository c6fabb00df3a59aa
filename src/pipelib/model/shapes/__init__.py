"""The parameters of each family, one file for each value of `model.architecture`; the chosen one alone is loaded.

Each file has `PARAMS`, a frozen dataclass of `ModelParams`, and `SECTION`, the same with `init_from`, as params.yaml has it.
No file here imports torch: stages read params.yaml whole before they know whether there is anything to do.
"""
