"""Compare the memory arithmetic of training with what torch.compile really keeps for the backward pass, without a GPU.

    python bench/memory.py                      the presets, each with its micro-batch, in bf16
    python bench/memory.py --presets gpt2-124m --rows 8

Fake tensors go through the compiler up to the place where it decides what the forward pass keeps and what the backward pass
computes again (AOTAutograd's partition); nothing is computed, and the largest model takes a few seconds. Left out are
weights, gradients and moments, which are exact, and the gradient of the logits, which does not exist yet at that point.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.files import format_bytes
from pipelib.model.decoder import family_of
from pipelib.model.device import autocast
from pipelib.params import Params, load_params
from pipelib.training.memory import Footprint
from pipelib.training.objectives import NextToken
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

PRESETS = Path(__file__).resolve().parents[1] / "presets"


def kept_bytes(params: Params, rows: int) -> dict[str, int]:
    """What the compiled forward pass keeps for the backward pass, in bytes, by the name of the operation."""
    kept: dict[str, int] = {}

    def note(graph: torch.fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        _, *saved = output.args[0]  # inputs that are kept, such as weights, exist in any case
        for node in saved:
            value = node.meta.get("val") if isinstance(node, torch.fx.Node) and node.op != "placeholder" else None
            if isinstance(value, torch.Tensor):
                kept[node.name] = value.numel() * value.element_size()
        return graph.forward

    backend = aot_autograd(
        fw_compiler=note,
        bw_compiler=lambda graph, _: graph.forward,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    length = params.train.sequence_length
    with FakeTensorMode(allow_non_fake_inputs=True), autocast(torch.device("cpu"), params.train.precision):
        model = family_of(params.model.architecture)(params.model, GPT2_TOKENIZER.size)
        model.activation_checkpointing = params.train.activation_checkpointing
        tokens = torch.zeros(rows, length, dtype=torch.long)
        torch.compile(NextToken(model), backend=backend)(tokens, tokens.clone())
    return kept


def estimated_bytes(params: Params, rows: int) -> int:
    """The same by the arithmetic: activations, copies of the weights, and the half of the logits' bytes that is not gradient."""
    compiled = replace(params.train, compile=True)
    memory = Footprint(params.model, GPT2_TOKENIZER.size, compiled).memory(rows)
    return memory.activations + memory.copies + memory.logits // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    parser.add_argument("--presets", nargs="+", choices=names, default=names, help="names in presets/; default: all")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; default: the preset's")
    arguments = parser.parse_args()
    print(f"{'preset':<12}{'rows':>5}{'kept':>12}{'estimated':>12}{'error':>8}   largest")
    for name in arguments.presets:
        params = load_params(PRESETS / f"{name}.yaml")
        rows = arguments.rows or params.train.micro_batch_rows(1)
        kept = kept_bytes(params, rows)
        total, estimate = sum(kept.values()), estimated_bytes(params, rows)
        largest = max(kept, key=lambda operation: kept[operation])
        print(
            f"{name:<12}{rows:>5}{format_bytes(total):>12}{format_bytes(estimate):>12}{estimate / total - 1:>+8.1%}   "
            f"{largest} {format_bytes(kept[largest])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
