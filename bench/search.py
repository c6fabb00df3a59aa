"""Bits per byte of the benchmark's documents for every combination of some parameters' values.

    python bench/search.py --try train.max_lr 0.004 0.008 0.015 --try train.schedule wsd cosine
    python bench/search.py --params presets/gpt2-quick.yaml --try train.max_lr 0.003 0.006 --try train.max_tokens 512000

Values are YAML; a parameter with one value is simply set. Needs data/raw and data/benchmarks of this checkout. The stages train
in a copy of it. The text that is scored is the same for all: the documents that the completion benchmark is made of. One seed
tells little about small differences: look at the neighbours in the table, and give the best ones to bench/recipe.py.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from checkout import CHECKOUT, Checkout, benchmark_texts

from pipelib.schema import read_yaml
from pipelib.workspace.places import HERE

MAKES_SHARDS = ("vocabulary", "tokenize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=CHECKOUT / HERE.params, help="default: params.yaml")
    parser.add_argument(
        "--try", dest="tried", nargs="+", action="append", required=True, metavar=("NAME", "VALUE"),
        help="a parameter, as SECTION.NAME, and its values; more than once for more parameters",
    )  # fmt: skip
    arguments = parser.parse_args()
    axes = {name: [yaml.safe_load(value) for value in values] for name, *values in arguments.tried}
    if empty := [name for name, values in axes.items() if not values]:
        parser.error(f"--try {empty[0]}: needs at least one value after the name")
    texts, varied = benchmark_texts(), [name for name, values in axes.items() if len(values) > 1]
    print("".join(f"{name:<24}" for name in varied) + f"{'tokens':>11}{'seconds':>9}{'bits/byte':>11}")
    with tempfile.TemporaryDirectory(prefix="bench-search-") as folder:
        checkout, shards_of = Checkout(Path(folder), read_yaml(arguments.params)), None
        for values in product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            for name, value in chosen.items():
                put(checkout.params, name.split("."), value)
            if shards_of != (shards_of := str([checkout.params[section] for section in MAKES_SHARDS])):
                checkout.tokenize()
            start = time.monotonic()
            checkout.train()
            seconds, (bits, _) = time.monotonic() - start, checkout.bits_per_byte(texts)
            print(
                "".join(f"{chosen[name]!s:<24}" for name in varied)
                + f"{checkout.params['train']['max_tokens']:>11,}{seconds:>9.1f}{bits:>11.4f}",
                flush=True,
            )


def put(params: dict[str, Any], path: Sequence[str], value: object) -> None:
    """Set a parameter that is there, at any depth."""
    *sections, name = path
    for section in sections:
        params = params.get(section) or {}
    if name not in params:
        raise SystemExit(f"--try {'.'.join(path)}: params.yaml has no such parameter")
    params[name] = value


if __name__ == "__main__":
    main()
