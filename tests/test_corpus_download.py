"""The download stage: which source, what decides its outs, and what it leaves behind."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_params import PARAMS

from pipelib.corpus.download import chosen_source, download, download_inputs
from pipelib.corpus.hub_lists import HubFile
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.parquet import iterate_raw
from pipelib.corpus.raw import Document, write_manifest
from pipelib.corpus.sources import docs
from pipelib.corpus.sources.docs import DocsSource
from pipelib.corpus.sources.hub import HubSource
from pipelib.corpus.sources.local import LocalSource
from pipelib.errors import UserError
from pipelib.files import files_under, sha256_file

ROOT = Path(__file__).parents[1]
DOCS = DownloadParams(
    **{
        **PARAMS["download"], "source": "docs", "path": "corpus", "repo": "someone/corpus", "folder": "sample",
        "benchmarks": ("completion",), "benchmark_documents": 40, "models": (),
    }
)  # fmt: skip
HUB = dataclasses.replace(DOCS, source="hub")


@pytest.fixture
def local(tmp_path: Path) -> DownloadParams:
    """A corpus of 60 documents and an empty one."""
    rows = [{"text": " ".join(f"d{document}w{word}" for word in range(100))} for document in range(60)]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"text": ""}]))
    return dataclasses.replace(DOCS, source="local", path=str(folder))


def test_each_source_has_its_class(local: DownloadParams) -> None:
    assert isinstance(chosen_source(DOCS), DocsSource)
    assert isinstance(chosen_source(local), LocalSource)
    assert isinstance(chosen_source(HUB), HubSource)


@pytest.mark.parametrize(
    ("params", "changes", "same"),
    [
        (DOCS, {"repo": "other/repo", "revision": "b" * 40, "folder": "x", "path": "y", "pattern": "z"}, True),
        (DOCS, {"seed": 2}, False),
        (DOCS, {"benchmark_documents": 41}, False),
        (DOCS, {"benchmarks": ("completion", "hellaswag")}, False),
        (DOCS, {"models": ("gpt2",)}, False),
        (DOCS, {"max_tokens": 1000}, False),
        (HUB, {"max_tokens": 1000}, False),
        (HUB, {"path": "y", "pattern": "z"}, True),
        (HUB, {"revision": "b" * 40}, False),
        (dataclasses.replace(HUB, benchmarks=()), {"seed": 2, "benchmark_documents": 41}, True),
    ],
)
def test_inputs_hold_what_decides_and_nothing_else(
    params: DownloadParams, changes: dict[str, object], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [HubFile("sample/000_00000.parquet", 1, "0" * 64)]
    monkeypatch.setattr("pipelib.corpus.sources.hub.list_files", lambda *_: listed)
    changed = dataclasses.replace(params, **changes)  # type: ignore[arg-type]
    assert (download_inputs(params, chosen_source(params)) == download_inputs(changed, chosen_source(changed))) is same


def test_inputs_of_docs_name_the_packages() -> None:
    assert set(download_inputs(DOCS, chosen_source(DOCS))["source"]["packages"]) == set(docs.PACKAGES)


def test_outs_and_result(local: DownloadParams, tmp_path: Path) -> None:
    result, speed = download(local, chosen_source(local), tmp_path / "outs", tmp_path / "work")
    assert [path.relative_to(tmp_path / "outs").as_posix() for path in files_under(tmp_path / "outs")] == [
        "data/benchmarks/completion.jsonl",
        "data/benchmarks/heldout.jsonl",
        "data/benchmarks/hellaswag.jsonl",
        "data/benchmarks/manifest.json",
        "data/conversations/manifest.json",
        "data/models/manifest.json",
        "data/raw/000_00000.parquet",
        "data/raw/manifest.json",
    ]
    assert result["documents"] == 60
    assert result["files"] == result["empty_dropped"] == 1
    assert result["benchmark_items"] == {"completion": 120, "heldout": 40}
    assert speed["megabytes_per_second"] > 0
    assert str(tmp_path) not in (tmp_path / "outs/data/raw/manifest.json").read_text()


def test_two_runs_give_the_same_bytes(local: DownloadParams, tmp_path: Path) -> None:
    for name in ("a", "b"):
        download(local, chosen_source(local), tmp_path / name, tmp_path / "work")
    for path in files_under(tmp_path / "a"):
        assert sha256_file(path) == sha256_file(tmp_path / "b" / path.relative_to(tmp_path / "a"))


def test_a_corpus_of_nothing_is_refused(local: DownloadParams, tmp_path: Path) -> None:
    (Path(local.path) / "a.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match=r"download\.source: local gave no document"):
        download(local, chosen_source(local), tmp_path / "outs", tmp_path / "work")


def test_the_stage_run_by_its_path_says_how_to_run_it() -> None:
    done = subprocess.run([sys.executable, ROOT / "stages/download.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("stages/download.py was run by its path")
    assert "Traceback" not in done.stderr


def test_nothing_in_the_corpus_wing_imports_torch() -> None:
    program = (
        "import pipelib.corpus.download, sys; sys.exit(any(name in sys.modules for name in ('torch', 'datasets')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(ROOT / "src")})


def test_max_tokens_ends_the_documents_of_local(local: DownloadParams, tmp_path: Path) -> None:
    whole, _ = download(local, chosen_source(local), tmp_path / "whole", tmp_path / "work")
    tokens = [-(-len(row["text"].encode()) // 4) for row in iterate_raw(tmp_path / "whole/data/raw")]
    params = dataclasses.replace(local, max_tokens=sum(tokens[:50]))
    result, _ = download(params, chosen_source(params), tmp_path / "part", tmp_path / "work")
    assert result["documents"] == 50
    assert result["tokens_estimated"] == sum(tokens[:50])
    assert "tokens_estimated" not in whole
    params = dataclasses.replace(local, max_tokens=sum(tokens[:50]) + 1)
    result, _ = download(params, chosen_source(params), tmp_path / "more", tmp_path / "work")
    assert result["documents"] == 51


def test_more_tokens_than_there_are_takes_all(
    local: DownloadParams, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params = dataclasses.replace(local, max_tokens=10**9)
    result, _ = download(params, chosen_source(params), tmp_path / "outs", tmp_path / "work")
    assert result["documents"] == 60
    assert "tokens, fewer than 1,000,000,000; all of it is used" in capfd.readouterr().out


def test_a_prefix_of_docs_is_the_start_of_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Document(f"text {number} " * 40, str(number)) for number in range(30)]
    monkeypatch.setattr(docs, "_read_all", lambda files: [found])  # noqa: ARG005
    monkeypatch.setattr(docs, "_source_files", list)
    write_manifest(tmp_path / "all", {}, DocsSource(1).write(tmp_path / "all", tmp_path))
    written = DocsSource(1, 500).write(tmp_path / "part", tmp_path)
    write_manifest(tmp_path / "part", {}, written)
    part = list(iterate_raw(tmp_path / "part"))
    assert part == list(iterate_raw(tmp_path / "all"))[: len(part)]
    assert 0 < len(part) < 30
    assert written.counts["tokens_estimated"] >= 500
    assert DocsSource(1).identity() == {key: DocsSource(1, 500).identity()[key] for key in ("kind", "packages", "seed")}
