"""The networks of the families, one file for each value of `model.architecture`. Only the chosen one is imported.

Each file has `DECODER`, a subclass of `Decoder`. Its parameters are in the file of the same name in `shapes/`.
"""
