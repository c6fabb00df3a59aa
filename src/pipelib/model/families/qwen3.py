"""Qwen3: SwiGLU, and queries and keys normed in each head. `Qwen3ForCausalLM` of transformers computes the same."""

from pipelib.model.rotary import RotaryDecoder


class Qwen3(RotaryDecoder):
    """See `rotary.py`; `Qwen3Params.norms_queries` is what differs."""

    architecture = "qwen3"
    class_name = "Qwen3ForCausalLM"


DECODER = Qwen3
