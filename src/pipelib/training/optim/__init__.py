"""The optimizers, one file for each value of `train.optimizer`; the chosen one alone is loaded.

Each file has `OPTIMIZER`, a class that is made of a model and the parameters of section `train`, and does what
`pipelib.training.optimizer.Optimizer` says.
"""
