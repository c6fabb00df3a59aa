"""The inputs of an evaluation, found without measuring anything."""

from dataclasses import asdict
from pathlib import Path

from pipelib.errors import UserError
from pipelib.evaluation.baselines import find_baselines
from pipelib.evaluation.benchmark_items import holds_items
from pipelib.evaluation.params import TASKS, EvaluateParams, benchmark_of
from pipelib.files import files_under, sha256_file
from pipelib.model.weights import CONFIG
from pipelib.tokens.shards import UNIGRAM_COUNTS, VALIDATION_SHARD, read_manifest
from pipelib.workspace.places import MANIFEST


def evaluation_inputs(
    params: EvaluateParams, models: Path, tokens: Path, benchmarks: Path, curves: Path, chat: Path
) -> dict[str, object]:
    """Everything that decides an evaluation: its parameters, the hash of every file it reads, and the baselines' weights.

    Raises:
        UserError: the model, the data, a task's data or a baseline is missing.
    """
    require_data(params, benchmarks)
    files = [
        *files_under(models), *files_under(chat), *files_under(benchmarks), *files_under(curves),
        tokens / VALIDATION_SHARD, tokens / UNIGRAM_COUNTS, tokens / MANIFEST,
    ]  # fmt: skip
    for path in (*files, models / CONFIG):
        if not path.is_file():
            raise UserError(f"{path} does not exist, so there is nothing to evaluate; run dvc repro.")
    hashes = {path.as_posix(): sha256_file(path) for path in files}
    tokenizer = read_manifest(tokens).tokenizer
    baselines = {
        baseline.name: baseline.identity
        | ({} if baseline.tokenizer == tokenizer else {"vocabulary": baseline.tokenizer.fingerprint})
        for baseline in find_baselines(params.baselines, tokenizer)
    }
    return {"evaluate": asdict(params), "files": hashes | task_hashes(params), "baselines": baselines}


def task_hashes(params: EvaluateParams) -> dict[str, str]:
    """The SHA-256 of each task's definition, by `task NAME`."""
    return {f"task {task}": sha256_file(TASKS / f"{task}.yaml") for task in params.tasks}


def require_data(params: EvaluateParams, benchmarks: Path) -> None:
    """Refuse tasks whose data is missing, before anything is computed.

    Raises:
        UserError: with all these tasks, and what to run.
    """
    missing = [task for task in params.tasks if not holds_items(benchmarks / f"{task}.jsonl")]
    if missing:
        wanted = ", ".join(sorted({benchmark_of(task) for task in missing}))
        raise UserError(
            f"{benchmarks} has no data for {', '.join(missing)}, so nothing could be scored; name {wanted} in "
            "download.benchmarks and run dvc repro, or drop the task."
        )
