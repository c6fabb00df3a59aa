"""What fine-tuning learns: invented facts, and LoRA against all weights on the conversations from docstrings.

    bench/finetuning.py facts --count 200      greedy answers that are right, and answers that end
    bench/finetuning.py lora --seeds 3         loss on held-out conversations, for each seed

Both start from `models/`, with section `finetune` of params.yaml; `--set max_lr=0.003` changes a parameter.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipelib.finetuning.dataset import Dataset, encode
from pipelib.finetuning.measure import answer_conversations
from pipelib.finetuning.params import AdapterParams, FinetuneParams
from pipelib.finetuning.sources import find_conversations
from pipelib.finetuning.task import Base, Finetuning
from pipelib.model.device import device_title, pick_device
from pipelib.model.weights import weights_sha256
from pipelib.params import load_params
from pipelib.schema import load_yaml
from pipelib.training.build import build_trainer
from pipelib.training.launch.distributed import join_world
from pipelib.training.schedule import Cadence
from pipelib.training.training_log import NullLog
from pipelib.vocabulary.chat import ASSISTANT, USER, ChatTemplate, Message
from pipelib.workspace.places import HERE

SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("facts", "lora"))
    parser.add_argument("--count", type=int, default=200, help="facts (200)")
    parser.add_argument("--epochs", type=float, default=30.0, help="passes over the facts (30)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the comparison (3)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter (8)")
    parser.add_argument("--base", type=Path, default=HERE.model, help="the model to start from (models)")
    parser.add_argument("--skip", type=int, default=0, help="conversations to leave out at the start (0)")
    parser.add_argument("--lora-lr", type=float, default=0.01, help="peak rate of the adapter (0.01)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a parameter of finetune")
    arguments = parser.parse_args()
    params = load_params().finetune
    changes = {key: load_yaml(value.encode()) for key, value in (pair.split("=", 1) for pair in arguments.set)}
    params = replace(
        params,
        **{
            key: float(value) if isinstance(value, int) and key.endswith("lr") else value
            for key, value in changes.items()
        },
    )
    print(f"{device_title(pick_device())}, base {arguments.base} {weights_sha256(arguments.base)[:12]}")
    if arguments.what == "facts":
        params = replace(params, epochs=arguments.epochs, validation=0.0, answers=arguments.count)
        learn_facts(params, arguments.base, arguments.count)
    else:
        adapter = AdapterParams(arguments.rank, 2.0 * arguments.rank, "all")
        compare(params, arguments.base, adapter, arguments.lora_lr, arguments.seeds, arguments.skip)


def facts(count: int) -> Iterator[tuple[str, Sequence[Message]]]:
    """Invented facts, each a question and a short answer that nothing else tells."""
    chance = random.Random(0)

    def word() -> str:
        return "".join(chance.choice(SYLLABLES) for _ in range(3)).capitalize()

    for number in range(count):
        yield f"fact {number}", (Message(USER, f"Where is {word()}?"), Message(ASSISTANT, f"{word()} is where it is."))


def learn_facts(params: FinetuneParams, base: Path, count: int) -> None:
    """Train on facts, and ask for them. One more is held out, since a validation needs one."""
    model, dataset, template, seconds, _ = train(params, base, facts(count + 1))
    answered = answer_conversations(model, dataset, params, template, held_out=False)
    print(
        f"{answered.count} facts, {params.epochs:g} epochs in {seconds:.0f} s: {answered.exact / answered.count:.1%} answered "
        f"exactly, {answered.ended / answered.count:.1%} ended"
    )


def compare(params: FinetuneParams, base: Path, adapter: AdapterParams, rate: float, seeds: int, skip: int) -> None:
    """Train all weights, and an adapter, on the same conversations with the same seeds."""
    for seed in range(seeds):
        row = []
        for name, chosen in (
            ("all weights", replace(params, seed=seed)),
            (f"LoRA {adapter.rank}", replace(params, seed=seed, adapter=adapter, max_lr=rate)),
        ):
            *_, seconds, loss = train(chosen, base, islice(find_conversations(params).read(), skip, None))
            row.append(f"{name} {loss:.4f} in {seconds:.0f} s")
        print(f"seed {seed}: {', '.join(row)}", flush=True)


def train(params: FinetuneParams, folder: Path, conversations: Any) -> tuple[Any, Dataset, ChatTemplate, float, float]:
    """Fine-tune the model in a folder; the model, its data and template, the seconds, and the loss on what was held out."""
    base = Base(str(folder), weights_sha256(folder))
    template = ChatTemplate.of(base.tokenizer)
    dataset, _ = encode(
        conversations,
        template,
        longest=params.sequence_length,
        train_on=params.train_on,
        validation=params.validation,
        most=params.max_conversations,
    )
    task = Finetuning(params, base, dataset)
    plan = replace(params.training(len(task.split(params.sequence_length, held_out=False))), validate_every=10**6)
    with tempfile.TemporaryDirectory() as work, join_world() as world:
        trainer = build_trainer(task, plan, Cadence(10**6, 10**6), Path(work), world, NullLog())
        started = time.perf_counter()
        model = trainer.run().eval()
        loss = trainer.validation.measure(model).mean
        return model, dataset, template, time.perf_counter() - started, loss


if __name__ == "__main__":
    main()
