"""Time HellaSwag: our scorer against one example per forward pass, with the bound set by floating-point operations.

    make bench-hellaswag                                             random items, GPT-2 124M with random weights
    make bench-hellaswag ARGS="--items FILE --count 200"             items of a file in HellaSwag's schema, such as
                                                                     data/benchmarks/hellaswag.jsonl
    make bench-hellaswag ARGS="--model data/models/gpt2 --precision bf16"

The plain loop is the obvious code: one item after the other, its four rows padded to one batch, logits at every position. The
two take turns on the same items in one process, and must give the same predictions.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.evaluation.benchmark_items import Item, read_items
from pipelib.evaluation.hellaswag import score
from pipelib.model.decoder import Decoder, build
from pipelib.model.device import autocast, pick_device
from pipelib.model.huggingface import import_model
from pipelib.model.params import published_params
from pipelib.processes import peak_memory
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

Predictions = list[tuple[int, int]]
"""For each item, the ending with the least summed loss and the one with the least mean loss."""


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    device = pick_device()
    model = load_model(arguments.model, device)
    items = read_items(arguments.items, GPT2_TOKENIZER) if arguments.items else random_items(arguments.count)
    items = items[: arguments.count]
    ways: dict[str, Callable[[Sequence[Item]], Predictions]] = {
        "plain": lambda some: plain(model, some, arguments.precision),
        "ours": lambda some: ours(model, some, arguments.batch_tokens, arguments.precision),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Predictions] = {}
    for number in range(arguments.rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way(items if number else items[:8])  # a short round warms up
            if number:
                seconds[name].append(time.perf_counter() - started)
    report(arguments, device, model, items, seconds, found)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, help="JSON lines in HellaSwag's schema; default: random items")
    parser.add_argument("--count", type=int, default=100, help="items to score; default: 100")
    parser.add_argument(
        "--model",
        help="gpt2, gpt2-medium, ... with random weights, or a Hugging Face folder; default: gpt2",
        default="gpt2",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--batch-tokens", type=int, help="positions per forward pass; default: 2048, on a GPU 65536")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, in turn; default: 3")
    arguments = parser.parse_args()
    arguments.batch_tokens = arguments.batch_tokens or (65536 if torch.cuda.is_available() else 2048)
    return arguments


def load_model(name: str, device: torch.device) -> Decoder:
    """A published shape with random weights, or a model from a folder."""
    if name in PUBLISHED_MODELS:
        model = build(published_params(name), GPT2_TOKENIZER.size)
        model.initialise(0)
    else:
        model = import_model(Path(name), GPT2_TOKENIZER)
    return model.to(device).eval()


def random_items(count: int) -> list[Item]:
    """Random items of about HellaSwag's lengths: contexts of 20 to 99 tokens, endings of 5 to 44."""
    rng = np.random.default_rng(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, 50256, rng.integers(low, high)).tolist())

    return [
        Item(tokens(20, 100), tuple(tokens(5, 45) for _ in range(4)), 0, number, ("", "a", "b", "c", "d"))
        for number in range(count)
    ]


def ours(model: Decoder, items: Sequence[Item], batch_tokens: int, precision: str) -> Predictions:
    """Score the items as the pipeline does."""
    scores = score(model, items, batch_tokens, precision)
    return list(zip(scores.sums.argmin(axis=1).tolist(), scores.means.argmin(axis=1).tolist(), strict=True))


@torch.no_grad()
def plain(model: Decoder, items: Sequence[Item], precision: str) -> Predictions:
    """Score one item per forward pass."""
    device = model.device
    predictions = []
    for item in items:
        rows = [[*item.context, *ending][-model.params.context_length - 1 :] for ending in item.endings]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for line, (row, ending) in enumerate(zip(rows, item.endings, strict=True)):
            tokens[line, : len(row)] = torch.tensor(row)
            mask[line, len(row) - len(ending) : len(row)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        with autocast(device, precision):
            logits = model.logits(model.hidden(tokens[:, :-1]))
        losses = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none") * mask[:, 1:]
        sums = losses.sum(dim=1)
        predictions.append((int(sums.argmin()), int((sums / mask[:, 1:].sum(dim=1)).argmin())))
    return predictions


def flops(model: Decoder, items: Sequence[Item]) -> dict[str, float]:
    """The operations that each way needs at least: 2 per weight of a matrix product, without attention."""
    head = 2 * model.head.numel()
    trunk = 2 * model.params.matrix_parameters(model.vocab_size) - head
    alone = sum(len(item.context) + len(ending) - 1 for item in items for ending in item.endings)
    shared = sum(len(item.context) + sum(len(ending) - 1 for ending in item.endings) for item in items)
    wanted = sum(1 + sum(len(ending) - 1 for ending in item.endings) for item in items)
    return {"plain": alone * (trunk + head), "ours": shared * trunk + wanted * head}


def report(
    arguments: argparse.Namespace,
    device: torch.device,
    model: Decoder,
    items: Sequence[Item],
    seconds: dict[str, list[float]],
    found: dict[str, Predictions],
) -> None:
    """Print what was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{model.params.parameters(GPT2_TOKENIZER.size):,} parameters, {arguments.precision}, {name}, torch {torch.__version__}"
    )
    print(
        f"{len(items):,} items of {arguments.items or 'random tokens'}, {arguments.batch_tokens:,} positions per forward pass"
    )
    needed = flops(model, items)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    for way, values in seconds.items():
        each = medians[way] / len(items)
        print(
            f"{way:<6}{medians[way]:8.2f} s ({min(values):.2f} to {max(values):.2f}), {each * 1e3:7.2f} ms per item, "
            f"{each * 10042:7.1f} s for all 10,042; {needed[way] / 1e12:.2f} TFLOP needed, "
            f"{needed[way] / medians[way] / 1e9:,.0f} GFLOP/s"
        )
    same = sum(one == two for one, two in zip(found["plain"], found["ours"], strict=True))
    print(f"ours is {medians['plain'] / medians['ours']:.2f} times as fast; by operations alone it would be "
          f"{needed['plain'] / needed['ours']:.2f} times")  # fmt: skip
    print(f"the same predictions on {same} of {len(items)} items; peak memory {peak(device)}")
    print(json.dumps({"seconds": medians, "ratio": medians["plain"] / medians["ours"], "flops": needed}))


def peak(device: torch.device) -> str:
    """The peak memory of this process."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return f"{used / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
