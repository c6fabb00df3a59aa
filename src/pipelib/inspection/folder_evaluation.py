"""Run the measurements of the evaluate stage on a model in any Hugging Face folder, outside the pipeline."""

import tempfile
from pathlib import Path

from pipelib.errors import UserError
from pipelib.evaluation.baselines import find_baselines
from pipelib.evaluation.evaluate import (
    CHECKOUT,
    describe_environment,
    describe_model,
    describe_source,
    describe_vocabulary,
    measure_all,
    require_validation,
)
from pipelib.evaluation.inputs import require_data
from pipelib.evaluation.items import write_items
from pipelib.evaluation.measure import Data, measure
from pipelib.evaluation.params import EvaluateParams
from pipelib.evaluation.report import Subject, write_report
from pipelib.evaluation.samples import write_samples
from pipelib.files import write_json
from pipelib.inspection.out_folder import make_out
from pipelib.model.device import pick_device
from pipelib.model.huggingface import find_model, import_model
from pipelib.model.weights import weights_sha256
from pipelib.tokens.shards import VALIDATION_SHARD, read_manifest
from pipelib.vocabulary.choice import chosen_tokenizer, published_tokenizer, tokenizer_of_model
from pipelib.workspace.places import HERE
from pipelib.workspace.provenance import code_hashes


def evaluate_folder(folder: Path, params: EvaluateParams, out: Path | None) -> Subject:
    """Measure a model and its baselines on the data in the workspace: the validation shard, the benchmarks, or one of them.

    Args:
        folder: a model in Hugging Face's format.
        out: the folder for the report, its numbers and every item; None to write nothing.

    Returns:
        The content of a report; `rows_of` gives its table.

    Raises:
        UserError: there is no such model, a baseline or the data of a task is missing, or there is nothing to measure.
    """
    tokens, benchmarks = HERE.tokens if (HERE.tokens / VALIDATION_SHARD).is_file() else None, HERE.benchmarks
    made_of = read_manifest(tokens) if tokens else None
    data = (
        Data(tokens, benchmarks, made_of.tokenizer, made_of.validation_bytes)
        if made_of
        else Data(None, benchmarks, chosen_tokenizer())
    )
    require_data(params, benchmarks)
    if not (data.tokens or data.completions or params.tasks):
        raise UserError(
            f"there is no validation shard in {HERE.tokens}, no benchmark in {benchmarks} and no task, so there is nothing to "
            "measure; run dvc repro tokenize."
        )
    others = find_baselines(params.baselines, data.tokenizer)  # fail before anything is computed
    manifest = require_validation(data.tokens) if data.tokens else None
    device = pick_device()
    tokenizer = tokenizer_of_model(folder, data.tokenizer)
    found = find_model(folder, tokenizer).model
    if out:
        make_out(out, empty=False)  # fail before the long work
    # measure the model, then the baselines on the same items
    code = code_hashes("evaluate", {"model.architecture": found.params.architecture}, CHECKOUT)
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(str(folder), folder, params, data, Path(scratch) / "harness", tokenizer)
        found_of_others = measure_all(others, params, data, code, device, Path(scratch) / "harness")
    baselines = {name: other.result for name, other in found_of_others.items()}
    result = measured.result | ({} if tokenizer == data.tokenizer else {"vocabulary": tokenizer.name})
    model = import_model(folder, tokenizer, quiet=True).to(device)
    samples = write_samples(model, tokenizer, params.sample_prompts, params.precision, seed=0) if out else []
    # what the report says about the model
    facts = {
        "model": f"`{folder}`",
        "weights": f"SHA-256 `{weights_sha256(folder)}`",
        **describe_model(model),
        "vocabulary": describe_vocabulary(tokenizer),
        **describe_environment(model, code),
    }
    if manifest:
        facts |= {
            "data fingerprint": f"`{manifest.fingerprint[:16]}`",
            "data source": describe_source(manifest.source),
        }
    source = manifest.source if manifest else {}
    parameters, vocab_size = model.params.parameters(model.vocab_size), model.vocab_size
    own = tokenizer != published_tokenizer()
    subject = Subject(result, baselines, parameters, vocab_size, source, facts, samples, None, own)
    if out:
        write_report(out, subject)
        write_items(out / "items.npz", measured.items)
        write_json(out / "evaluation.json", result | ({"baselines": baselines} if baselines else {}))
    return subject
