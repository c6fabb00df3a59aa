"""Bits per byte of the benchmark's documents for vocabularies of several sizes, with the model and the time of params.yaml.

    python bench/vocabulary.py                                  GPT-2's, and 1,024 to 16,384 tokens trained on the corpus
    python bench/vocabulary.py --sizes 4096 8192 --seeds 3

Needs data/raw and data/benchmarks of this checkout. Each vocabulary is trained, the corpus tokenized, and the model trained by
the stages themselves, in a copy of the checkout. GPT-2's comes first: its training with params.yaml gives the seconds. Then
`max_tokens` of the others is set to what their model reads in these seconds, measured in a short run; `--same-tokens` leaves
it. The text that is scored is the same for all: the documents that the completion benchmark is made of.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from checkout import CHECKOUT, Checkout, benchmark_texts

from pipelib.schema import read_yaml
from pipelib.workspace.places import HERE

TRIAL_STEPS = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="tokens")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each vocabulary; default: 1")
    parser.add_argument("--same-tokens", action="store_true", help="train on as many tokens as params.yaml says")
    parser.add_argument("--params", type=Path, default=CHECKOUT / HERE.params, help="default: params.yaml")
    arguments = parser.parse_args()
    texts = benchmark_texts()
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes")
    print(
        f"{'vocabulary':<12}{'seed':>5}{'bytes/token':>12}{'parameters':>12}{'tokens':>10}{'seconds':>9}{'bits/byte':>10}"
    )
    seconds: list[float] = []
    for size in (None, *arguments.sizes):
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory(prefix="bench-vocabulary-") as folder:
                run = Checkout(Path(folder), read_yaml(arguments.params))
                run.params["vocabulary"] |= {"source": "train", "vocab_size": size} if size else {"source": "gpt2"}
                run.params["train"]["seed"] = 1337 + seed
                run.tokenize()
                tokens = run.params["train"]["max_tokens"]
                if size is not None and not arguments.same_tokens:
                    tokens = tokens_in(run, np.mean(seconds).item())
                run.train(max_tokens=tokens)
                if size is None:
                    seconds.append(run.seconds)
                print(line(run, size, texts), flush=True)


def tokens_in(run: Checkout, seconds: float) -> int:
    """How many tokens the model reads in a time, from a short run."""
    step = run.params["train"]["global_batch_tokens"]
    run.train(max_tokens=TRIAL_STEPS * step)
    warm = run.speeds[len(run.speeds) // 2 :]  # the first steps are slower
    return int(seconds * np.mean(warm)) // step * step


def line(run: Checkout, size: int | None, texts: list[str]) -> str:
    """The figures of a run."""
    bits, bytes_per_token = run.bits_per_byte(texts)
    model, tokenizer = run.model
    return (
        f"{size or 'gpt2':<12}{run.params['train']['seed']:>5}{bytes_per_token:>12.3f}"
        f"{model.params.parameters(tokenizer.size):>12,}{run.params['train']['max_tokens']:>10,}{run.seconds:>9.0f}"
        f"{bits:>10.3f}"
    )


if __name__ == "__main__":
    main()
