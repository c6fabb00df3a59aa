"""The optimizers, one file for each value of `train.optimizer`. Only the chosen one is imported.

Each file has `OPTIMIZER`, a class whose constructor takes a model and the parameters of section `train`, and which follows
the protocol `pipelib.training.optimizer.Optimizer`.
"""
