"""`pipelib evaluate`: what a model in a Hugging Face folder is worth, without the pipeline."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelib.errors import UserError
from pipelib.workspace.places import HERE

if TYPE_CHECKING:
    from pipelib.evaluation.measure import Data
    from pipelib.evaluation.params import EvaluateParams

EXAMPLES = """examples:
  pipelib evaluate --model models
  pipelib evaluate --model ../gpt2 --tasks hellaswag piqa --limit 200
  pipelib evaluate --model data/models/gpt2 --out gpt2-report         the report, the numbers and every item
  pipelib evaluate --model ./mine --baselines ./yours                 two models in one table
"""
TOKENS, BENCHMARKS = HERE.tokens, HERE.benchmarks


def add_parser(subparsers: Any) -> None:
    """Add `evaluate` to the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure any model in a Hugging Face folder",
        description="Measure what the stage evaluate measures: the loss on data/tokens' validation shard, the four-way "
        "benchmarks and the lm-eval tasks whose data is in data/benchmarks. What is not given comes from section evaluate of "
        "params.yaml. The pipeline's outs and metrics stay as they are.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--tasks", nargs="*", metavar="NAME", help="tasks of the lm-eval harness")
    parser.add_argument("--limit", type=int, metavar="N", help="examples of each task, from its start")
    parser.add_argument(
        "--baselines", nargs="*", default=[], metavar="NAME", help="gpt2, ..., or folders; default: none"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="arithmetic of matrix products")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write evaluation.md, .html, .json and items.npz there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, and write what --out asks for."""
    from pipelib.evaluation.measure import Data
    from pipelib.tokens.shards import VALIDATION_SHARD, read_manifest
    from pipelib.vocabulary.choice import chosen_tokenizer

    params = _params(arguments)
    tokens = TOKENS if (TOKENS / VALIDATION_SHARD).is_file() else None
    data = Data(tokens, BENCHMARKS, read_manifest(tokens).tokenizer if tokens else chosen_tokenizer())
    _evaluate(arguments.model, params, data, arguments.out)
    return 0


def _params(arguments: argparse.Namespace) -> "EvaluateParams":
    """Section evaluate of params.yaml, with what the command line says.

    Raises:
        UserError: a task or baseline that nobody knows, or a limit below 1.
    """
    from pipelib.params import load_params

    params = replace(load_params().evaluate, baselines=tuple(arguments.baselines))
    if arguments.tasks is not None:
        params = replace(params, tasks=tuple(arguments.tasks))
    if arguments.limit is not None:
        if arguments.limit < 1:
            raise UserError(f"--limit {arguments.limit} would score nothing; give 1 or more.")
        params = replace(params, task_limit=arguments.limit)
    if arguments.precision is not None:
        params = replace(params, precision=arguments.precision)
    if problems := list(params.problems()):
        raise UserError("\n".join(f"--{problem}" for problem in problems))
    return params


def _evaluate(folder: Path, params: "EvaluateParams", data: "Data", out: Path | None) -> None:
    import tempfile

    from pipelib.cli.table import aligned
    from pipelib.evaluation.baselines import find_baselines
    from pipelib.evaluation.evaluate import (
        CHECKOUT,
        describe_environment,
        describe_model,
        describe_source,
        measure_baselines,
        require_validation,
    )
    from pipelib.evaluation.inputs import require_data
    from pipelib.evaluation.items import write_items
    from pipelib.evaluation.measure import measure
    from pipelib.evaluation.report import Subject, rows_of, write_report
    from pipelib.evaluation.samples import write_samples
    from pipelib.files import write_json
    from pipelib.model.device import pick_device
    from pipelib.model.huggingface import import_model
    from pipelib.model.weights import weights_sha256
    from pipelib.workspace.provenance import code_hashes

    require_data(params, data.benchmarks)
    if not (data.tokens or data.completions or params.tasks):
        raise UserError(
            f"there is no validation shard in {TOKENS}, no benchmark in {BENCHMARKS} and no task, so there is nothing to "
            "measure; run dvc repro tokenize."
        )
    find_baselines(params.baselines, data.tokenizer)  # before anything is computed
    manifest = require_validation(data.tokens) if data.tokens else None
    device = pick_device()
    model = import_model(folder, data.tokenizer).to(device)
    code = code_hashes("evaluate", {"model.architecture": model.params.architecture}, CHECKOUT)
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(str(folder), model, params, data, Path(scratch) / "harness")
        others = measure_baselines(params, data, code, device, Path(scratch) / "harness")
    baselines = {name: other.result for name, other in others.items()}
    samples = write_samples(model, data.tokenizer, params.sample_prompts, params.precision, seed=0) if out else []
    facts = {
        "model": f"`{folder}`",
        "weights": f"SHA-256 `{weights_sha256(folder)}`",
        **describe_model(model),
        **describe_environment(model, code),
    }
    if manifest:
        facts |= {
            "data fingerprint": f"`{manifest.fingerprint[:16]}`",
            "data source": describe_source(manifest.source),
        }
    source = manifest.source if manifest else {}
    parameters, vocab_size = model.params.parameters(model.vocab_size), model.vocab_size
    subject = Subject(measured.result, baselines, parameters, vocab_size, source, facts, samples, None)
    print(aligned([[cell.replace("*", "") for cell in row[:4]] for row in rows_of(subject)]))
    if out:
        write_report(out, subject)
        write_items(out / "items.npz", measured.items)
        write_json(out / "evaluation.json", measured.result | ({"baselines": baselines} if baselines else {}))
        print(f"\nwritten: {out}/evaluation.md, evaluation.html, evaluation.json, items.npz")
