"""The network of each family, one file for each value of `model.architecture`; the chosen one alone is loaded.

Each file has `DECODER`, a subclass of `Decoder`. Its parameters are in the file of the same name in `shapes/`.
"""
