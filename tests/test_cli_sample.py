"""Text from a Hugging Face folder: every prompt with its continuation, the same for the same seed."""

from pathlib import Path

import pytest
from small_vocabulary import TOKENIZER

from pipelib.cli.main import main
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model
from pipelib.model.shapes.gpt2 import GPT2Params


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    gpt = GPT2(GPT2Params(n_layer=1, n_head=2, n_embd=16, context_length=16), TOKENIZER.size)
    gpt.initialise(0)
    export_model(gpt, TOKENIZER, folder, {})
    return folder


def sample(model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["sample", "--model", str(model), "--device", "cpu", "--tokens", "20", *arguments]) == 0
    return capsys.readouterr().out


def test_prompts_and_continuations(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = sample(model, capsys, "--prompt", "Returns the", "日本 é", "--prompt", "")
    first, second, third = said.split("-" * 80 + "\n")
    assert first.startswith("Returns the")
    assert second.startswith("日本 é")
    assert min(map(len, (first, second, third))) > 20


def test_seed_and_temperature(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = sample(model, capsys, "--prompt", "The", "--seed", "1")
    assert sample(model, capsys, "--prompt", "The", "--seed", "1") == one
    assert sample(model, capsys, "--prompt", "The", "--seed", "2") != one
    greedy = [sample(model, capsys, "--prompt", "The", "--temperature", "0", "--seed", seed) for seed in "12"]
    assert greedy[0] == greedy[1]
    assert sample(model, capsys, "--prompt", "The", "--top-k", "1") == greedy[0]
    assert sample(model, capsys, "--prompt", "The", "--top-p", "1e-6") == greedy[0]


def test_several_texts_for_each_prompt(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = sample(model, capsys, "--prompt", "The", "A")
    said = sample(model, capsys, "--prompt", "The", "A", "--num-samples", "3")
    texts = said.removesuffix("\n").split("\n" + "-" * 80 + "\n")
    assert [text[:1] for text in texts] == ["T", "T", "T", "A", "A", "A"]
    assert len(set(texts)) == 6
    assert once == f"{texts[0]}\n{'-' * 80}\n{texts[3]}\n"


def test_top_p_draws_among_all_tokens_unless_top_k_is_given(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    among_all = sample(model, capsys, "--prompt", "The", "--top-p", "1")
    assert sample(model, capsys, "--prompt", "The", "--top-p", "1", "--top-k", "500") == among_all
    assert sample(model, capsys, "--prompt", "The") != among_all
    assert sample(model, capsys, "--prompt", "The", "--top-p", "1", "--top-k", "50") == sample(
        model, capsys, "--prompt", "The"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "warp"], "--device warp cannot be used here"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "mps"], " from the 'MPS' backend); use --device cpu."),
        (["--tokens", "0"], "--tokens 0 would write nothing"),
        (["--temperature", "-1"], "--temperature -1 is negative"),
        (["--top-k", "0"], "--top-k 0 leaves no token"),
        (["--top-p", "1.2"], "--top-p 1.2 is not a probability above 0"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--seed", str(2**63)], "seed 9223372036854775808 is out of range"),
        (["--seed", str(2**64)], "seed 18446744073709551616 is out of range"),
        (["--num-samples", "0"], "--num-samples 0 would write nothing"),
        (["--num-samples", "3", "--temperature", "0"], "--temperature 0 would write the same text 3 times"),
        (["--model", "nowhere"], "nowhere is not a folder with a model"),
    ],
)
def test_mistakes(arguments: list[str], words: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--prompt", "The", "--model", str(model), "--device", "cpu", *arguments]) == 1
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def test_a_prompt_that_is_longer_than_the_context_is_continued_with_a_word_about_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--prompt", "The " * 200, "--tokens", "1", "--model", str(model), "--device", "cpu"]) == 0
    assert "tokens and the model sees 16, so it continues the end without" in capsys.readouterr().err
    assert main(["sample", "--prompt", "The", "--tokens", "1", "--model", str(model), "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""
