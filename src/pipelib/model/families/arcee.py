"""Arcee: Llama with the square of ReLU in the place of a gate. `ArceeForCausalLM` of transformers computes the same."""

from pipelib.model.rotary import RotaryDecoder, SquaredMLP


class Arcee(RotaryDecoder):
    """See `rotary.py`."""

    architecture = "arcee"
    class_name = "ArceeForCausalLM"
    mlp = SquaredMLP
    activation = "relu2"


DECODER = Arcee
