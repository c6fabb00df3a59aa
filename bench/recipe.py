"""Tokens and seconds that two recipes, each a parameter file, need to reach the same loss.

    python bench/recipe.py presets/gpt2-quick.yaml params.yaml
    python bench/recipe.py a.yaml b.yaml --seeds 3 --target 2.6      the bits per byte to reach; default: a's final ones

Needs data/raw and data/benchmarks of this checkout. The stages train in copies of the checkout, in turns: a, b, a, b, so that a
slow hour meets both. The loss is that of the validation split, in bits per byte, and between two validations the curve is taken
as a straight line. Then the final model of each is measured on the documents of the completion benchmark, which are the same
text for every vocabulary. Intervals are 95 %, by Student's t over the seeds, of the paired ratios where there are pairs.

To train for less makes the rate fall earlier. So b's tokens to the target come from one curve and are an upper limit: a run that
ends there, with its rate at the end, would be better. `--ends` looks for that run: it trains b again and again, each time on half
of the tokens between a run that reached the target and one that did not.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkout import Checkout, benchmark_texts
from scipy import stats

from pipelib.evaluation.loss import Loss
from pipelib.evaluation.measure import count_text_bytes
from pipelib.schema import read_yaml
from pipelib.tokens.shards import VALIDATION_SHARD, open_shard, read_manifest
from pipelib.workspace.places import HERE

HALVINGS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs=2, help="two parameter files")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each; default: 3")
    parser.add_argument("--target", type=float, help="bits per byte of the validation split")
    parser.add_argument("--ends", action="store_true", help="look for the shortest run of b that ends at the target")
    arguments = parser.parse_args()
    texts = benchmark_texts()
    with tempfile.TemporaryDirectory(prefix="bench-recipe-") as folder:
        recipes = [
            Recipe(Path(folder, str(number)), path.stem, read_yaml(path))
            for number, path in enumerate(arguments.recipes)
        ]
        print(
            f"{'recipe':<20}{'seed':>5}{'tokens':>11}{'seconds':>9}{'validation':>11}{'documents':>10}"
            f"{'tokens to':>11}{'seconds to':>11}"
        )
        rows: list[list[tuple[float, float]]] = [[], []]
        for seed in range(arguments.seeds):
            target = arguments.target
            for recipe, found in zip(recipes, rows, strict=True):
                recipe.checkout.train(seed=1337 + seed, max_tokens=recipe.max_tokens)
                target = target or recipe.final
                if arguments.ends and recipe is recipes[1]:
                    recipe.shorten(target)
                found.append(recipe.to(target))
                print(recipe.line(target, texts), flush=True)
    for index, what in enumerate(("tokens", "seconds")):
        ratios = [two[index] / one[index] for one, two in zip(*rows, strict=True)]
        print(f"{what} of {arguments.recipes[1].stem} by those of {arguments.recipes[0].stem}: {interval(ratios)}")


def interval(values: Sequence[float]) -> str:
    """The mean with its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f} (one seed)"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


class Recipe:
    """A parameter file, with the shards that it asks for."""

    def __init__(self, root: Path, name: str, params: dict[str, Any]) -> None:
        root.mkdir()
        self.name, self.max_tokens = name, params["train"]["max_tokens"]
        self.checkout = Checkout(root, params)
        self.checkout.tokenize()
        train = self.checkout.params["train"]
        self._tokens = train["validate_tokens"] // train["sequence_length"] * train["sequence_length"]
        measured = open_shard(root / HERE.tokens / VALIDATION_SHARD)[1 : self._tokens + 1]
        self._bytes = count_text_bytes(measured, read_manifest(root / HERE.tokens).tokenizer)

    def _bits(self, loss: float) -> float:
        return Loss(loss * self._tokens, self._tokens).bits_per_byte(self._bytes)

    @property
    def final(self) -> float:
        """Bits per byte of the validation split at the end."""
        return self._bits(self.checkout.validation[-1][1])

    def to(self, target: float) -> tuple[float, float]:
        """Tokens and seconds until the validation split has the target; infinite if it never has."""
        curve = [(tokens, self._bits(loss)) for tokens, loss in self.checkout.validation]
        for (before, high), (after, low) in pairwise(curve):
            if low <= target < high:
                tokens = before + (after - before) * (high - target) / (high - low)
                return tokens, self.checkout.seconds * tokens / self.checkout.params["train"]["max_tokens"]
        return float("inf"), float("inf")

    def shorten(self, target: float) -> None:
        """Train on fewer tokens, as few as still end at the target."""
        train = self.checkout.params["train"]
        step, reached, missed = train["global_batch_tokens"], self.max_tokens, 0
        for _ in range(HALVINGS):
            tokens = (reached + missed) // 2 // step * step
            self.checkout.train(max_tokens=tokens)
            reached, missed = (tokens, missed) if self.final <= target else (reached, tokens)
        self.checkout.train(max_tokens=reached)

    def line(self, target: float, texts: list[str]) -> str:
        """The figures of the last training."""
        train, (tokens, seconds) = self.checkout.params["train"], self.to(target)
        bits, _ = self.checkout.bits_per_byte(texts)
        return (
            f"{self.name:<20}{train['seed']:>5}{train['max_tokens']:>11,}{self.checkout.seconds:>9.1f}"
            f"{self.final:>11.4f}{bits:>10.4f}{tokens:>11,.0f}{seconds:>11.1f}"
        )


if __name__ == "__main__":
    main()
