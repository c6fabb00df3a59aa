"""The harness measures of our model in memory what it measures of the exported folder, on tasks as it defines them."""

import importlib.util
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_evaluation import (
    PARAMS,
    TASKS,
    completion_rows,
    hub_rows,
    real_data,
    small_model,
    state,  # noqa: F401 (a fixture)
    words,
    write_lines,
)
from small_params import model_params
from small_run import random_model

from pipelib.errors import UserError
from pipelib.evaluation.harness import TaskResult, continue_prompts, language_model, run_tasks, standard_error
from pipelib.evaluation.params import TASKS as FOLDER
from pipelib.evaluation.params import known_tasks
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.generate import GREEDY, generate
from pipelib.model.huggingface import export_model
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


@pytest.fixture(scope="module")
def model() -> GPT2:
    return small_model()


# ---- The tasks -------------------------------------------------------------------------------------------------------

HARNESS_FILES = {
    "hellaswag": "hellaswag/hellaswag", "lambada_openai": "lambada/lambada_openai", "piqa": "piqa/piqa",
    "arc_easy": "arc/arc_easy", "winogrande": "winogrande/default", "sciq": "sciq/sciq",
    "openbookqa": "openbookqa/openbookqa", "wikitext": "wikitext/wikitext",
}  # fmt: skip
DECIDES = (
    "output_type", "process_docs", "doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "metric_list", "metadata",
    "num_fewshot", "filter_list", "generation_kwargs", "target_delimiter", "fewshot_split", "description", "repeats",
)  # fmt: skip
"""What of a task's definition can change its scores, where the data is the same."""


BENCHMARKS = Path("data/benchmarks")


def read_task(path: Path) -> dict[str, Any]:
    """A task's YAML, its functions as their names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: f"function {loader.construct_scalar(node)}")
    task: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader)
    return task


@pytest.mark.parametrize("name", HARNESS_FILES)
def test_a_task_is_defined_as_the_harness_defines_it(name: str) -> None:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "tasks" / f"{HARNESS_FILES[name]}.yaml"
    ours, theirs = read_task(FOLDER / f"{name}.yaml"), read_task(path)
    for key in DECIDES:
        expected = theirs.get(key)
        if isinstance(expected, str) and expected.startswith("function "):
            module = f"lm_eval.tasks.{path.parent.name}"
            expected = f"function {module}.{expected.removeprefix('function ')}"
        assert ours.get(key) == expected, key
    split = theirs.get("test_split") or theirs["validation_split"]  # the harness scores the former where there is one
    assert ours["dataset_kwargs"]["data_files"] == {split: f"data/benchmarks/{name}.jsonl"}
    assert (ours.get("test_split") or ours["validation_split"]) == split


def test_there_are_the_harness_tasks_and_two_of_the_corpus() -> None:
    assert set(known_tasks()) >= {*HARNESS_FILES, "completion", "heldout"}


# ---- The same scores as the harness's own model ----------------------------------------------------------------------


def hugging_faces_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own view of a model in a Hugging Face folder."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    # Imported by lm-eval's module and of no use to one process, the package accelerate need not be installed.
    for module, names in {
        "accelerate": ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"),
        "accelerate.utils": ("get_max_memory",),
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names)))  # type: ignore[arg-type]
    from lm_eval.models.huggingface import HFLM

    pretrained = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return HFLM(pretrained, tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True), batch_size=1)


def theirs(lm: Any, tasks: tuple[str, ...], limit: int | None = None) -> Any:
    """What the harness's own command would compute."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        limit=limit,
        bootstrap_iters=10,
        log_samples=False,
    )


def assert_equal(ours: dict[str, TaskResult], outcome: Any) -> None:
    """Every metric to the last digit that is shown, and the standard errors of all means."""
    for task, found in ours.items():
        expected = {name.removesuffix(",none"): value for name, value in outcome["results"][task].items()}
        metrics = [name for name in found.scores if f"{name}_stderr" in found.scores]
        assert set(metrics) == {name for name in expected if f"{name}_stderr" in expected}
        for metric in metrics:
            value, wanted = found.scores[metric], expected[metric]
            assert value == pytest.approx(wanted, rel=1e-6), f"{task}.{metric}"
            assert f"{value:.4f}" == f"{wanted:.4f}" or value > 1000
            if metric.startswith("acc"):
                assert found.scores[f"{metric}_stderr"] == pytest.approx(expected[f"{metric}_stderr"], rel=1e-9)
        assert found.scores["version"] == outcome["versions"][task]
        assert found.scores["examples"] == outcome["n-samples"][task]["effective"]
        assert found.scores["examples_in_all"] == outcome["n-samples"][task]["original"]


def test_scores_are_those_of_the_harness_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: GPT2
) -> None:
    chance = np.random.default_rng(4)
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "other [a] *?"
    write_lines(elsewhere / "completion.jsonl", completion_rows(12))
    write_lines(elsewhere / "heldout.jsonl", [{"text": words(chance, 2, 90)} for _ in range(6)])
    for name, rows in hub_rows(12).items():
        write_lines(elsewhere / f"{name}.jsonl", rows)
    export_model(model, GPT2_TOKENIZER, tmp_path / "model", {})
    tasks = ("completion", "heldout", *TASKS)
    ours = run_tasks(model, GPT2_TOKENIZER, replace(PARAMS, tasks=tasks), elsewhere, tmp_path / "scratch")
    (tmp_path / "data").mkdir()
    elsewhere.rename(tmp_path / BENCHMARKS)  # where the tasks' files have their data
    shown = capsys.readouterr().err
    for words_shown in ("lm-eval: loading completion, heldout", "lm-eval: answers", "lm-eval: whole texts"):
        assert words_shown in shown
    assert ours["lambada_openai"].scores.keys() == {
        "perplexity", "perplexity_stderr", "acc", "acc_stderr", "version", "examples", "examples_in_all",
    }  # fmt: skip
    lm = hugging_faces_model(tmp_path / "model", monkeypatch)
    assert_equal(ours, theirs(lm, tasks))
    assert ours["heldout"].scores["examples"] == 6
    assert ours["wikitext"].scores["version"] == 2.0

    for task, found in ours.items():
        assert len(found.items.ids) == len(set(found.items.ids.tolist())) == found.scores["examples"]
        for metric, values in found.items.values.items():
            weights = found.items.weights.get(metric)
            mean = float(np.average(values, weights=weights))
            mean = {"acc": mean, "acc_norm": mean, "bits_per_byte": mean / np.log(2)}.get(metric, np.exp(mean))
            assert mean == pytest.approx(found.scores[metric], rel=1e-9), f"{task}.{metric}"
    assert ours["completion"].items.documents.tolist() == [number // 3 for number in range(12)]

    limited = run_tasks(
        model, GPT2_TOKENIZER, replace(PARAMS, tasks=("piqa",), task_limit=5), BENCHMARKS, tmp_path / "scratch"
    )
    assert_equal(limited, theirs(lm, ("piqa",), limit=5))
    assert limited["piqa"].scores["limit"] == 5
    assert limited["piqa"].scores["examples_in_all"] == 12

    prompts = [words(chance, 1, 20) for _ in range(5)]
    options = {"until": [" not", "café"], "max_gen_toks": 6}
    requests = [SimpleNamespace(args=(prompt, options)) for prompt in prompts]
    written = language_model(model, GPT2_TOKENIZER, PARAMS, nullcontext).generate_until(requests)
    assert written == lm.generate_until(requests, disable_tqdm=True)


def test_scores_on_real_data_are_those_of_the_harness_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`PIPELIB_TEST_DATA=FOLDER` with the tasks' data as JSON lines, in the columns of the hub or as (query, choices, gold)."""
    wide = random_model(model_params(n_embd=64, context_length=256), tokenizer=GPT2_TOKENIZER)
    monkeypatch.chdir(tmp_path)
    for name, rows in real_rows(real_data(), 60).items():
        write_lines(tmp_path / f"data/benchmarks/{name}.jsonl", rows)
    export_model(wide, GPT2_TOKENIZER, tmp_path / "model", {})
    tasks = ("hellaswag", "piqa", "arc_easy", "lambada_openai", "wikitext")
    ours = run_tasks(
        wide, GPT2_TOKENIZER, replace(PARAMS, batch_tokens=2048, tasks=tasks), BENCHMARKS, tmp_path / "scratch"
    )
    assert_equal(ours, theirs(hugging_faces_model(tmp_path / "model", monkeypatch), tasks))


def real_rows(folder: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """The first rows of each set, in the hub's columns."""

    def lines(name: str) -> list[dict[str, Any]]:
        (path,) = folder.glob(f"{name}*.jsonl")
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]

    rows = {name: lines(name) for name in ("hellaswag", "piqa", "arc_easy", "lambada_openai")}
    if "goal" not in rows["piqa"][0]:
        rows["piqa"] = [
            {
                "goal": row["query"].removeprefix("Question: ").rstrip("\n"), "sol1": row["choices"][0],
                "sol2": row["choices"][1], "label": row["gold"],
            }
            for row in rows["piqa"]
        ]  # fmt: skip
    if "question" not in rows["arc_easy"][0]:
        rows["arc_easy"] = [
            {
                "question": row["query"].removeprefix("Question: "), "answerKey": "ABCDE"[row["gold"]],
                "choices": {"text": row["choices"], "label": list("ABCDE")[: len(row["choices"])]},
            }
            for row in rows["arc_easy"]
        ]  # fmt: skip
    if "text" not in rows["lambada_openai"][0]:
        rows["lambada_openai"] = [{"text": f"{row['context']} {row['continuation']}"} for row in rows["lambada_openai"]]
    text = next(folder.glob("wikitext*test.txt")).read_text(encoding="utf-8")
    pages = [f" = {page}" for page in text.split("\n = ") if page.strip()]
    return {**rows, "wikitext": [{"page": page[:3000]} for page in pages[:10]]}


# ---- Standard errors, generation, bad input --------------------------------------------------------------------------


def test_standard_errors_are_about_those_of_a_bootstrap() -> None:
    chance = np.random.default_rng(0)
    losses = chance.gamma(3, 1, 400)
    sizes = chance.integers(5, 50, 400)
    draws = chance.integers(0, 400, (3000, 400))
    means = losses[draws].mean(axis=1)
    ratios = (losses * sizes)[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    assert standard_error("acc", losses, None) == pytest.approx(means.std(), rel=0.08)
    assert standard_error("perplexity", losses, None) == pytest.approx(np.exp(means).std(), rel=0.1)
    assert standard_error("word_perplexity", losses, sizes) == pytest.approx(np.exp(ratios).std(), rel=0.1)
    assert standard_error("bits_per_byte", losses, sizes) == pytest.approx((ratios / np.log(2)).std(), rel=0.08)
    assert standard_error("acc", losses[:1], None) is None


def test_prompts_are_continued_together_as_alone(model: GPT2) -> None:
    encoding = GPT2_TOKENIZER
    options = {"max_gen_toks": 5, "until": ["\n"]}
    prompts = [([number + 5] * (1 + number % 4 * 9), options) for number in range(7)]  # some leave no room
    done: list[int] = []
    together = continue_prompts(model, GPT2_TOKENIZER, [*prompts, ([1, 2], {"max_gen_toks": 2})], done.append)
    for (token_ids, _), text in zip(prompts, together[:-1], strict=True):
        (new,) = generate(model, [token_ids[-19:]], 5, GREEDY, stop_token_id=50256)
        assert text == encoding.decode(new).split("\n")[0]
    assert sum(done) == 8


def test_a_task_without_its_data_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GPT2
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data is missing .*name its benchmark in download.benchmarks"):
        run_tasks(model, GPT2_TOKENIZER, replace(PARAMS, tasks=("heldout",)), BENCHMARKS, tmp_path / "scratch")


def test_a_model_whose_logits_are_no_numbers_has_no_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GPT2
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "data/benchmarks/completion.jsonl", completion_rows(3))
    lost = random_model(model.params, tokenizer=GPT2_TOKENIZER)
    with torch.no_grad():
        lost.ln_f.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        run_tasks(lost, GPT2_TOKENIZER, replace(PARAMS, tasks=("completion",)), BENCHMARKS, tmp_path / "scratch")


@pytest.mark.parametrize(
    "bad", ["{", "[1]", '{"endings": []}', '{"endings": ["a", " "]}', '{"choices": {"label": []}}']
)
def test_an_example_that_cannot_be_scored_is_named_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GPT2, bad: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_lines(tmp_path / "data/benchmarks/completion.jsonl", completion_rows(2))
    path.write_text(path.read_text(encoding="utf-8") + bad + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"completion\.jsonl, line 3 is not .*pipelib verify data/benchmarks --repair"):
        run_tasks(model, GPT2_TOKENIZER, replace(PARAMS, tasks=("completion",)), BENCHMARKS, tmp_path / "scratch")


def test_a_context_of_white_space_alone_is_the_start_of_a_text(model: GPT2) -> None:
    harness = language_model(model, GPT2_TOKENIZER, PARAMS, nullcontext)
    (blank,) = harness._loglikelihood_tokens([(("", ""), [], [7, 8]), (("", ""), [1, 2], [7, 8])])[:1]
    (start,) = harness._loglikelihood_tokens([(("", ""), [50256], [7, 8])])
    assert blank == pytest.approx(start)
