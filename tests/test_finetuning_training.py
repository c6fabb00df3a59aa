"""Fine-tuning as a training: facts that are learned, adapters as PEFT has them, and the bytes after a kill."""

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_chat import FAMILIES, base_model, encoded, facts, write_conversations
from small_params import finetune_params
from small_run import ALONE, SmallProject, kill, same
from small_vocabulary import TOKENIZER
from test_kill import RUNS, SEED
from torch.utils.flop_counter import FlopCounterMode

from pipelib.errors import UserError
from pipelib.files import sha256_file
from pipelib.finetuning.measure import answer_conversations
from pipelib.finetuning.params import FinetuneParams
from pipelib.finetuning.sources import chosen_for, finetune_inputs
from pipelib.finetuning.task import Base, Finetuning
from pipelib.model.adapters import adapter_of, add_adapter, export_adapter, import_adapted, merged
from pipelib.model.decoder import Decoder
from pipelib.model.huggingface import export_model
from pipelib.tracking.run import NullRun
from pipelib.training.build import build_trainer
from pipelib.training.hardware import Peak
from pipelib.training.loop import Trainer
from pipelib.training.memory import Footprint
from pipelib.training.schedule import Cadence
from pipelib.training.training_log import MainLog
from pipelib.vocabulary.chat import ChatTemplate, Message
from pipelib.vocabulary.tokenizer import Tokenizer

LENGTH = 96
LORA = {"rank": 8, "alpha": 16.0, "targets": "all"}


def params(**changes: Any) -> FinetuneParams:
    """Rows of 96 tokens, four in a step."""
    values = {"source": "local", "sequence_length": LENGTH, "global_batch_tokens": 4 * LENGTH, "micro_batch_size": 4}
    return finetune_params(**{**values, "answers": 100, "answer_tokens": 24, **changes})


def trainer_of(
    folder: Path,
    chosen: FinetuneParams,
    tokenizer: Tokenizer,
    told: list[list[Message]],
    family: str = "qwen3",
    **shape: int,
) -> tuple[Trainer, Finetuning]:
    """A fine-tuning in this process, from a new base."""
    export_model(base_model(family, tokenizer.size, **shape), tokenizer, folder / "base", {})
    base = Base(str(folder / "base"), sha256_file(folder / "base/model.safetensors"))
    dataset, _ = encoded(told, tokenizer, LENGTH, validation=chosen.validation)
    task = Finetuning(chosen, base, dataset)
    train = chosen.training(len(task.split(LENGTH, held_out=False)))
    work = folder / "work"
    work.mkdir()
    log = MainLog(work, NullRun(), train, 1, lambda: Peak(1e12, "made up"))
    return build_trainer(task, train, Cadence(10**6, 10**6), work, ALONE, log), task


# ---- Learning --------------------------------------------------------------------------------------------------------


def test_thirty_facts_are_learned_and_every_answer_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chosen = params(epochs=60.0, max_lr=1e-2, validation=0.0, validate_every=10**6)
    trainer, task = trainer_of(tmp_path, chosen, tokenizer, facts(31), hidden_size=64, intermediate_size=128)
    before = sha256_file(tmp_path / "base/model.safetensors")
    model = trainer.run().eval()
    answered = answer_conversations(model, task.dataset, chosen, ChatTemplate.of(tokenizer), held_out=False)
    assert answered.count == 30
    assert answered.ended == 30
    assert answered.exact >= 29, "of 30"
    assert sha256_file(tmp_path / "base/model.safetensors") == before


def losses(folder: Path) -> list[float]:
    return [float(line.split(",")[2]) for line in (folder / "work/train.csv").read_text().splitlines()[1:]]


def test_accumulation_and_packing_change_nothing_but_rounding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    curves = {}
    for rows in (1, 2, 4):
        trainer, _ = trainer_of(tmp_path / str(rows), params(micro_batch_size=rows), tokenizer, facts(60))
        trainer.run()
        curves[rows] = losses(tmp_path / str(rows))
        assert len(curves[rows]) >= 8
    assert curves[1] == pytest.approx(curves[4], rel=1e-5)
    assert curves[2] == pytest.approx(curves[4], rel=1e-5)


# ---- Adapters --------------------------------------------------------------------------------------------------------


def with_new_adapter(family: str, size: int, targets: Any = "all") -> Decoder:
    model = base_model(family, size).eval()
    add_adapter(model, 4, 8.0, targets, seed=3)
    return model


def random_tokens(size: int) -> torch.Tensor:
    return torch.randint(0, size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_no_bit(family: str, tokenizer: Tokenizer) -> None:
    tokens = random_tokens(tokenizer.size)
    with torch.no_grad():
        assert torch.equal(
            with_new_adapter(family, tokenizer.size).hidden(tokens),
            base_model(family, tokenizer.size).eval().hidden(tokens),
        )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_the_merged_model_have_our_logits(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export_model(base_model(family, tokenizer.size), tokenizer, tmp_path / "base", {})
    model, tokens = with_new_adapter(family, tokenizer.size), random_tokens(tokenizer.size)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for matrix in adapter_of(model).parameters():
            matrix.add_(torch.randn(matrix.shape, generator=generator) * 0.3)
        ours = model.logits(model.hidden(tokens))[..., : tokenizer.size]
        export_adapter(model, tmp_path / "adapter", {"path": str(tmp_path / "base"), "sha256": "x"})
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        assert (theirs(tokens).logits - ours).abs().max() < 1e-5
        base = base_model(family, tokenizer.size).eval()
        assert (base.logits(base.hidden(tokens))[..., : tokenizer.size] - ours).abs().max() > 1e-2, "it does something"
        alone = merged(model)
        assert (alone.logits(alone.hidden(tokens))[..., : tokenizer.size] - ours).abs().max() < 1e-5
        assert "adapter" not in dict(alone.named_children())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_read_again_and_belongs_to_its_base_alone(
    family: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    export_model(base_model(family, tokenizer.size), tokenizer, tmp_path / "base", {})
    sha256, tokens = sha256_file(tmp_path / "base/model.safetensors"), random_tokens(tokenizer.size)
    model = with_new_adapter(family, tokenizer.size)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for matrix in adapter_of(model).parameters():
            matrix.add_(torch.randn(matrix.shape, generator=generator) * 0.3)
        export_adapter(model, tmp_path / "adapter", {"path": str(tmp_path / "base"), "sha256": sha256})
        ours = model.logits(model.hidden(tokens))[..., : tokenizer.size]
        read = import_adapted(tmp_path / "base", tokenizer, tmp_path / "adapter")
        assert (read.logits(read.hidden(tokens))[..., : tokenizer.size] - ours).abs().max() < 1e-5
    other = base_model(family, tokenizer.size)
    with torch.no_grad():
        other.get_parameter(other.embedding_names[0])[0] += 1
    export_model(other, tokenizer, tmp_path / "other", {})
    with pytest.raises(
        UserError, match=rf"was trained on weights with SHA-256 {sha256[:16]}, and .*other has .* nonsense"
    ):
        import_adapted(tmp_path / "other", tokenizer, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "has use_dora, which pipelib does not support"),
        ({"peft_type": "IA3"}, "has peft_type IA3, bias none, which pipelib does not support"),
        ({"r": 3}, r"layers\.0\.mlp\.down_proj is \(4, 32\), not \(3, 32\), so the adapter does not fit"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    changes: dict[str, Any], words: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    export_model(base_model("llama", tokenizer.size), tokenizer, tmp_path / "base", {})
    sha256 = sha256_file(tmp_path / "base/model.safetensors")
    export_adapter(with_new_adapter("llama", tokenizer.size), tmp_path / "adapter", {"path": "base", "sha256": sha256})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_bytes())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=words):
        import_adapted(tmp_path / "base", tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter_config\.json does not exist, so there is no adapter"):
        import_adapted(tmp_path / "base", tokenizer, tmp_path / "nowhere")
    export_model(base_model("gpt2", tokenizer.size), tokenizer, tmp_path / "gpt2", {})
    (tmp_path / "adapter/base.json").unlink()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="which GPT-2 does not have as a linear layer"):
        import_adapted(tmp_path / "gpt2", tokenizer, tmp_path / "adapter")


def test_only_the_named_layers_are_adapted(tokenizer: Tokenizer) -> None:
    model = with_new_adapter("gpt2", tokenizer.size, ("attn.c_proj",))
    assert list(adapter_of(model).layers) == ["h.0.attn.c_proj", "h.1.attn.c_proj"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    with pytest.raises(
        UserError, match=r"targets: q_proj matches no linear layer of GPT-2, .* choose from c_attn, c_fc, c_proj"
    ):
        with_new_adapter("gpt2", tokenizer.size, ("q_proj",))
    with pytest.raises(
        UserError, match=r"adapter\.rank: 99 is larger than the smaller dimension of one of the chosen layers \(16\)"
    ):
        add_adapter(base_model("gpt2", tokenizer.size), 99, 8.0, "all", seed=3)


# ---- The stage -------------------------------------------------------------------------------------------------------


def project_of(folder: Path, **changes: object) -> SmallProject:
    """A checkout with a base, conversations and parameters of `finetune`."""
    values = {
        "source": "local",
        "sequence_length": 48,
        "global_batch_tokens": 192,
        "micro_batch_size": 2,
        "epochs": 2.0,
        "answer_tokens": 16,
    }
    options = {f"finetune__{name}": value for name, value in {**values, **changes}.items()}
    project = SmallProject.make(folder, model__context_length=96, evaluate__batch_tokens=512, **options)
    project.stage = "finetune"
    export_model(base_model("gpt2", TOKENIZER.size), TOKENIZER, folder / "models", {"train": {"max_lr": 1.0}})
    write_conversations(folder / "conversations/a.jsonl", facts(200))
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    return project_of(tmp_path_factory.mktemp("project"))


def test_the_stage_makes_a_model_a_page_and_its_lineage(project: SmallProject) -> None:
    outs = project.uninterrupted(1)
    assert {name for name in outs if name.startswith("chat/") and name.count("/") == 1} == {
        "chat/answers.json", "chat/manifest.json", "chat/masks.html",
    }  # fmt: skip
    assert {"chat/model/chat_template.jinja", "chat/curves/train.csv"} <= outs.keys()
    lineage, recipe = json.loads(outs["chat/manifest.json"]), json.loads(outs["chat/model/recipe.json"])
    base = sha256_file(project.folder / "models/model.safetensors")
    assert lineage["base"]["weights_sha256"] == recipe["base"]["weights_sha256"] == base
    assert lineage["base"]["recipe"] == {"train.max_lr": 1.0}
    (file,) = lineage["conversations"]["source"]["files"]
    assert file["sha256"] == sha256_file(project.folder / "conversations/a.jsonl")
    result = json.loads(outs["metrics/finetune.json"])
    assert result["kept"] == 200
    assert result["val_loss"] < result["val_loss_before"]
    assert result["answers"]["count"] == 4
    assert result["corpus_bits_per_byte"]["before"] > 0
    assert json.loads(outs["chat/answers.json"])["questions"][0]["question"] == "Who is it?"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a training in /proc")
@pytest.mark.random
@pytest.mark.parametrize(
    ("ranks", "adapter"),
    [
        pytest.param(1, None, marks=pytest.mark.long),
        (1, LORA),
        pytest.param(2, None, marks=pytest.mark.long),
        pytest.param(2, LORA, marks=pytest.mark.long),
    ],
)
def test_killed_at_random_instants_it_ends_with_the_same_bytes(tmp_path: Path, ranks: int, adapter: Any) -> None:
    project, chance = project_of(tmp_path, adapter=adapter), random.Random(SEED + ranks)
    expected = project.uninterrupted(ranks)
    kills = 0
    while kills < max(1, RUNS // 2):
        project.begin_anew()
        for _ in range(8):
            training = project.start(ranks)
            step = chance.randrange(1, 25)
            training.wait_until(lambda training=training, step=step: training.step() >= step)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.1))
            victims = sorted(training.processes())
            killed = bool(victims) and kill(chance.choice(victims), chance.choice([signal.SIGKILL, signal.SIGTERM]))
            kills += killed
            training.end()
            if not killed or kills >= max(1, RUNS // 2):
                break
        assert not same(project.run(ranks), expected), f"PIPELIB_TEST_SEED={SEED}"
    print(f"\nranks {ranks}, adapter {adapter is not None}, seed {SEED}: {kills} kills, all bytes equal")


@pytest.mark.long
def test_two_ranks_train_as_one(project: SmallProject) -> None:
    one, two = (json.loads(project.uninterrupted(ranks)["metrics/finetune.json"]) for ranks in (1, 2))
    assert one["val_loss"] == pytest.approx(two["val_loss"], abs=1e-3)
    assert one["val_loss_before"] == pytest.approx(two["val_loss_before"], abs=1e-6)


def refused(project: SmallProject) -> str:
    done = project.complete()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    project = project_of(tmp_path, init_from="./models", adapter=dict(LORA, targets=["q_proj"]))
    assert "finetune.adapter.targets: q_proj matches no linear layer of GPT-2" in refused(project)
    (tmp_path / "models/chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert "models has a chat template of its own" in refused(project)
    (tmp_path / "models/chat_template.jinja").unlink()
    write_conversations(tmp_path / "conversations/a.jsonl", [facts(1)[0][:1]])
    assert "a.jsonl, row 1: the last turn is the user's, so there is no answer to learn from; fix this row" in refused(
        project
    )


def test_what_describes_the_base_decides_the_result_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    chosen = finetune_params(source="local", init_from="./models")
    before = finetune_inputs(chosen)
    config = json.loads((tmp_path / "models/config.json").read_bytes())
    (tmp_path / "models/config.json").write_text(json.dumps({**config, "n_positions": 48}))
    assert finetune_inputs(chosen) != before
    assert before["family"], "the code of a base's own family"
    assert "family" not in finetune_inputs(finetune_params(source="local"))


def test_docstrings_are_asked_about_in_their_own_corpus_alone(capsys: pytest.CaptureFixture[str]) -> None:
    docs = finetune_params(source="docs")
    assert chosen_for(docs, "docs") == docs
    assert chosen_for(docs, "local").source == "none"
    assert "the corpus is of the source local, so there is no fine-tuning" in capsys.readouterr().out
    assert chosen_for(finetune_params(source="local"), "hub").source == "local"


def test_fewer_rows_than_a_step_has_are_refused(tmp_path: Path) -> None:
    project = project_of(tmp_path, global_batch_tokens=48 * 400)
    assert "400 rows per step, and the conversations fill only" in refused(project)


def test_an_adapter_needs_the_memory_and_the_disk_of_what_it_trains(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trainer, task = trainer_of(tmp_path, params(adapter=LORA), tokenizer, facts(30))
    own = sum(matrix.numel() for matrix in adapter_of(trainer.model).parameters())
    assert task.trained_parameters == own
    few = Footprint(task.model, tokenizer.size, trainer.params, 1, own)
    every = Footprint(task.model, tokenizer.size, trainer.params)
    assert few.checkpoint == 12 * own < every.checkpoint
    assert few.memory(4).gradients < every.memory(4).gradients
    assert few.memory(4).weights == every.memory(4).weights


def test_the_work_of_an_adapter_is_what_is_computed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    computed, expected = [], []
    for number, adapter in enumerate((None, {**LORA, "rank": 1})):
        trainer, task = trainer_of(
            tmp_path / str(number), params(adapter=adapter), tokenizer, facts(30), num_hidden_layers=8, hidden_size=64
        )
        tokens, positions = torch.ones(2, LENGTH, dtype=torch.long), torch.arange(LENGTH).repeat(2, 1)
        with FlopCounterMode(display=False) as counter:
            task.objective(trainer.model)(tokens, tokens, positions).backward()
        computed.append(counter.get_total_flops() / tokens.numel())
        expected.append(task.flops_per_token(LENGTH))
    assert computed[0] - computed[1] == pytest.approx(expected[0] - expected[1], rel=0.1)


def test_without_a_source_it_makes_an_empty_out_and_needs_no_torch(tmp_path: Path) -> None:
    project = project_of(tmp_path, source="none")
    training = project.start(command=[sys.executable, "-X", "importtime", "-m", "stages.finetune"])
    assert training.end() == 0, training.output()
    assert project.outs().keys() == {"chat/manifest.json", "metrics/finetune.json"}
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in training.output().splitlines()}
    assert not imported & {"torch", "pyarrow", "datasets", "transformers"}


def test_shards_of_the_validation_split_show_what_was_forgotten(project: SmallProject) -> None:
    outs = project.uninterrupted(1)
    result = json.loads(outs["metrics/finetune.json"])["corpus_bits_per_byte"]
    assert np.isfinite([result["before"], result["after"]]).all()
    assert result["before"] != result["after"]
