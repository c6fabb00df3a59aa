"""A coordinate check: how large the activations are after five steps, for models of several widths.

    python bench/widths.py                                   of params.yaml: half, once, two and four times its width
    python bench/widths.py --params presets/gpt2-quick.yaml --factors 1 2 4 8

Where a row stays about level, the rates that were tuned at one width hold for the others. Where it grows with the width, a wider
model needs lower ones. Needs data/tokens of this checkout, made with the same vocabulary. Heads multiply with the width.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelib.model.decoder import build
from pipelib.model.params import ZERO_PROJECTIONS, InitialisedModelParams, ModelParams, family_params
from pipelib.params import Params, load_params
from pipelib.tokens.shards import read_manifest
from pipelib.training.batches import make_loader
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import NextToken
from pipelib.training.optimizer import make_optimizer
from pipelib.training.step import take_step
from pipelib.workspace.places import HERE

STEPS = 5
WIDTHS = ("n_embd", "n_head", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=HERE.params, help="default: params.yaml")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1, 2, 4], help="of the width")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    models = [scaled(params.model, factor) for factor in arguments.factors]
    columns = [sizes(params, model) for model in models]
    print(
        f"{'root mean square after ' + str(STEPS) + ' steps':<34}"
        + "".join(f"{f'x {f:g}':>10}" for f in arguments.factors)
    )
    for name in columns[0]:
        print(f"{name:<34}" + "".join(f"{column[name]:>10.4f}" for column in columns))


def scaled(params: ModelParams, factor: float) -> ModelParams:
    """The same family with another width, and as many more heads."""
    shape = {name: value for name, value in asdict(params).items() if name not in ("architecture", "init_from")}
    return family_params(params.architecture)(
        **{name: round(value * factor) if name in WIDTHS else value for name, value in shape.items()}
    )


def sizes(params: Params, shape: ModelParams) -> dict[str, float]:
    """The root mean square of what each block writes, of the final hidden states and of the logits."""
    manifest, world = read_manifest(HERE.tokens), World(0, 1, torch.device("cpu"))
    train = replace(params.train, micro_batch_size=1)
    model = build(shape, manifest.tokenizer.size)
    assert isinstance(params.model, InitialisedModelParams)
    model.initialise(train.seed, zero_projections=params.model.init_from == ZERO_PROJECTIONS)
    optimizer, objective = make_optimizer(model, train), NextToken(model)
    loader, _ = make_loader(train, HERE.tokens, manifest, world)
    for step in range(STEPS):
        take_step(objective, objective, optimizer, loader.micro_batches(step), train.max_lr, train, world)
    found: dict[str, float] = {}

    def watch(name: str) -> None:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:  # noqa: ARG001
            found[name] = rms(out - inputs[0])

        model.get_submodule(name).register_forward_hook(note)

    assert model.block_list is not None
    blocks = model.get_submodule(model.block_list[0])
    for number, _ in enumerate(blocks.children()):
        watch(f"{model.block_list[0]}.{number}")
    inputs = loader.micro_batches(STEPS)[0][0]
    with torch.no_grad():
        hidden = model.hidden(inputs)
        found["hidden states"] = rms(hidden)
        found["logits"] = rms(model.logits(hidden)[..., : model.vocab_size])
    return found


def rms(values: Tensor) -> float:
    """The root mean square."""
    return values.float().square().mean().sqrt().item()


if __name__ == "__main__":
    main()
