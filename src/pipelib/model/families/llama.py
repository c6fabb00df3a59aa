"""Llama: SwiGLU, and nothing besides. `LlamaForCausalLM` of transformers computes the same."""

from pipelib.model.rotary import RotaryDecoder


class Llama(RotaryDecoder):
    """See `rotary.py`."""

    architecture = "llama"
    class_name = "LlamaForCausalLM"


DECODER = Llama
