"""Time the lm-eval harness: our model in memory against the harness's own `hf` model from the exported folder.

    make bench-harness ARGS="--tasks hellaswag piqa --limit 100"     tasks whose data is in data/benchmarks; GPT-2 124M with
                                                                     random weights
    make bench-harness ARGS="--model models --tasks completion heldout"

Both score the same requests in one process, in turn. The harness's model takes batches of --batch-size rows; ours takes batches
with as many positions as a batch of --batch-size of the longest rows. The time excludes loading data and models.
"""

import argparse
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checkout import model_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.evaluation.harness import language_model
from pipelib.evaluation.params import TASKS, EvaluateParams
from pipelib.model.device import pick_device
from pipelib.model.huggingface import import_model
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    device = pick_device()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch
        folder = model_folder(arguments.model, Path(scratch))
        model = import_model(folder, GPT2_TOKENIZER).to(device)
        params = EvaluateParams("fp32", 1, tuple(arguments.tasks), arguments.limit, (), ())
        models = {"hf": hugging_faces_model(folder, arguments.batch_size, device)}
        lengths = request_lengths(models["hf"], params)
        params = replace(params, batch_tokens=max(model.params.context_length, arguments.batch_size * max(lengths)))
        models["ours"] = language_model(model, GPT2_TOKENIZER, params, nullcontext)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        results: dict[str, Any] = {}
        for _ in range(arguments.rounds):
            for name, lm in models.items():
                took, results[name] = run(lm, params)
                seconds[name].append(took)
    report(arguments, params, device, seconds, results)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="gpt2", help="gpt2, ... with random weights, or a Hugging Face folder; default: gpt2"
    )
    parser.add_argument("--tasks", nargs="+", default=["completion"], help="lm-eval tasks; default: completion")
    parser.add_argument("--limit", type=int, default=50, help="examples per task; default: 50")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per batch of the harness's model; default: 8")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each model, in turn; default: 3")
    return parser.parse_args()


def hugging_faces_model(folder: Path, batch_size: int, device: torch.device) -> Any:
    """The harness's own model, loaded from the folder."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    # lm-eval imports accelerate, which one process does not use: stub it, so that it need not be installed.
    for module, names in {
        "accelerate": ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"),
        "accelerate.utils": ("get_max_memory",),
    }.items():
        sys.modules.setdefault(module, SimpleNamespace(**dict.fromkeys(names)))  # type: ignore[arg-type]
    from lm_eval.models.huggingface import HFLM

    pretrained = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return HFLM(pretrained, tokenizer=tokenizer, batch_size=batch_size)


def loaded_tasks(params: EvaluateParams) -> Any:
    """Load the tasks and their data; each run needs fresh ones, since tasks keep the answers."""
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(TASKS), include_defaults=False).load(list(params.tasks))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    return loaded


def request_lengths(lm: Any, params: EvaluateParams) -> list[int]:
    """The tokens of each request, at most the model's maximum."""
    lengths = []
    for task in loaded_tasks(params)["tasks"].values():
        with redirect_stderr(io.StringIO()):
            task.build_all_requests(limit=params.task_limit)
        texts = ["".join(part for part in request.args if isinstance(part, str)) for request in task.instances]
        lengths += [min(lm.max_length, len(lm.tok_encode(text))) for text in texts]
    return lengths


def run(lm: Any, params: EvaluateParams) -> tuple[float, Any]:
    """Score all requests with a model; return the seconds and the scores."""
    from lm_eval.evaluator import evaluate

    loaded = loaded_tasks(params)
    started = time.perf_counter()
    with redirect_stderr(io.StringIO()):
        outcome = evaluate(lm, loaded, limit=params.task_limit, bootstrap_iters=0, log_samples=False)
    return time.perf_counter() - started, outcome["results"]


def report(
    arguments: argparse.Namespace,
    params: EvaluateParams,
    device: torch.device,
    seconds: dict[str, list[float]],
    results: dict[str, Any],
) -> None:
    """Print what was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.model}, fp32, {name}; {', '.join(params.tasks)}, {params.task_limit} examples each")
    print(f"hf: batches of {arguments.batch_size} rows; ours: {params.batch_tokens:,} positions")
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    for way, values in seconds.items():
        print(f"{way:<5}{medians[way]:8.2f} s ({min(values):.2f} to {max(values):.2f})")
    print(f"ours is {medians['hf'] / medians['ours']:.2f} times as fast")
    differ = [
        f"{task}.{metric}: {value} and {results['hf'][task][metric]}"
        for task, scores in results["ours"].items()
        for metric, value in scores.items()
        if isinstance(value, float) and not math.isclose(value, results["hf"][task][metric], rel_tol=1e-6)
    ]
    print("the same scores to six digits" if not differ else f"scores differ: {'; '.join(differ)}")
    print(json.dumps({"seconds": medians, "ratio": medians["hf"] / medians["ours"]}))


if __name__ == "__main__":
    main()
