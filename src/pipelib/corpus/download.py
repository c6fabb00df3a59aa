"""The work of the download stage: get the corpus from its source, the benchmarks and the published models."""

import importlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelib.corpus.hub_benchmarks import COMPLETION, HUB_BENCHMARKS
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.published_models import PUBLISHED_MODELS, is_hub_model
from pipelib.corpus.raw import Source, write_manifest
from pipelib.errors import UserError, tell
from pipelib.workspace.places import Places


def chosen_source(params: DownloadParams) -> Source:
    """Return the source of text that the parameters name."""
    # Imported by name, so that a change of one source does not re-run the users of another.
    module = importlib.import_module(f"pipelib.corpus.sources.{params.source}")
    source: Source = module.source(params)
    return source


def download_inputs(params: DownloadParams, origin: Source) -> dict[str, Any]:
    """Return only what decides the outs: for example, changing `download.repo` changes nothing if the source is `docs`."""
    inputs: dict[str, Any] = {
        "source": origin.identity(),
        "benchmarks": sorted(params.benchmarks),
        "models": sorted(params.models),
    }
    for name in sorted(params.benchmarks):
        if name in HUB_BENCHMARKS:
            inputs[f"benchmark {name}"] = asdict(HUB_BENCHMARKS[name])
    for name in sorted(params.models):
        if is_hub_model(name):
            from pipelib.corpus.baselines import hub_model_files  # asks the hub, if its list is not stored

            inputs[f"model {name}"] = {"files": [file.identity() for file in hub_model_files(name)]}
        else:
            inputs[f"model {name}"] = asdict(PUBLISHED_MODELS[name])
    if COMPLETION in params.benchmarks:
        inputs["completion"] = {"documents": params.benchmark_documents, "seed": params.seed}
    if params.conversations:
        from pipelib.corpus.hub_conversations import conversation_files  # asks the hub, if its list is not stored

        files = [file.identity() for file in conversation_files(params.conversations)]
        inputs["conversations"] = {**asdict(params.conversations), "files": files}
    return inputs


def download(params: DownloadParams, origin: Source, outs: Path, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the corpus, the benchmarks and the models under `outs`.

    Args:
        outs: gets data/raw, data/benchmarks, data/models and data/conversations.
        work: kept until the stage has finished, so that a killed run can resume from it.

    Returns:
        The result (`metrics/download.json`) and the speed (`metrics/speed/download.json`).

    Raises:
        UserError: the source has no text, or cannot be used; the message says why.
    """
    # Imported here, because the stage may only have to link finished outs.
    from pipelib.corpus.baselines import write_baselines
    from pipelib.corpus.benchmarks import write_benchmarks
    from pipelib.corpus.hub_conversations import write_conversations
    from pipelib.corpus.hub_store import fetch_pinned

    started = time.monotonic()
    places = Places(outs)
    raw = places.raw
    written = origin.write(raw, work)
    seconds = time.monotonic() - started
    if not any(file.rows for file in written.files):
        raise UserError(
            f"download.source: {params.source} gave no documents, so there is nothing to train on; add text."
        )
    tokens = written.counts.get("tokens_estimated")
    if params.max_tokens is not None and tokens is not None and tokens < params.max_tokens:
        tell(
            f"download.max_tokens: the corpus has about {tokens:,} tokens, fewer than {params.max_tokens:,}; all of it is used"
        )
    # The benchmarks are made from the raw text, so its manifest must exist first.
    manifest = write_manifest(raw, origin.identity(), written)
    benchmarks = write_benchmarks(params, raw, places.benchmarks, fetch_pinned, written.validation_documents)
    write_baselines(params.models, places.published_models, fetch_pinned)
    write_conversations(params.conversations, places.conversations)
    parquet_bytes = sum(file.bytes for file in manifest.files)
    result = {
        "documents": manifest.documents,
        "files": len(manifest.files),
        "parquet_bytes": parquet_bytes,
        **written.counts,
        "benchmark_documents": max((entry["documents"] for entry in benchmarks.values()), default=0),
        "benchmark_items": {Path(name).stem: entry["items"] for name, entry in benchmarks.items()},
    }
    megabytes = written.counts.get("text_bytes", parquet_bytes) / 1e6
    return result, {"corpus_seconds": round(seconds, 2), "megabytes_per_second": round(megabytes / seconds, 2)}
