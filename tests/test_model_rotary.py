"""llama, qwen3 and arcee: the logits of transformers' classes, both ways, and what their config.json may say."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelib.errors import UserError
from pipelib.files import read_json, write_json
from pipelib.model.decoder import Decoder, build
from pipelib.model.generate import GREEDY, generate
from pipelib.model.huggingface import CONFIG, export_model, find_model, import_model
from pipelib.model.params import family_params
from pipelib.model.rotary import frequencies, slowing
from pipelib.model.rotary_params import RopeScaling
from pipelib.schema import parse
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

SIZE = GPT2_TOKENIZER.size
SHAPE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "context_length": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
SCALING = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)  # Llama 3.2's, for a context so short that heads of 8 have fast, slow and middling pairs
FAMILIES = ("llama", "qwen3", "arcee")
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "arcee": "ArceeForCausalLM"}
families = pytest.mark.parametrize("family", FAMILIES)
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def model_of(family: str, **changes: Any) -> Decoder:
    """A model whose weights and norms are large enough to matter."""
    model = build(family_params(family)(**{**SHAPE, **changes}), SIZE)
    model.initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(8.0)
    return model.eval()


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, SIZE, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: Decoder, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(inputs))[..., :SIZE]


@families
@ties
def test_the_exported_folder_gives_transformers_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    import transformers

    model = model_of(family, tie_word_embeddings=tied)
    export_model(model, GPT2_TOKENIZER, tmp_path, {})
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == CLASSES[family]
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = tokens()
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs).logits, logits_of(model, inputs), atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == GPT2_TOKENIZER.encode("a b")


@families
@ties
def test_weights_that_transformers_saved_are_read(family: str, tied: bool, tmp_path: Path) -> None:
    import transformers

    model = model_of(family, tie_word_embeddings=tied)
    export_model(model, GPT2_TOKENIZER, tmp_path / "ours", {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="2MB")  # in several files
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 1
    back = import_model(tmp_path / "theirs", GPT2_TOKENIZER)
    assert back.params == model.params
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    half = import_model(tmp_path / "bf16", GPT2_TOKENIZER)
    same = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(half, tokens()), same(tokens()).logits, atol=1e-5, rtol=1e-5)


@families
def test_greedy_texts_are_transformers(family: str, tmp_path: Path) -> None:
    """Batched and padded on the left there, with the cache here."""
    import transformers

    model = model_of(family)
    export_model(model, GPT2_TOKENIZER, tmp_path, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = [[5, 9, 300], [7], [11, 12, 13, 14, 15]]
    ours = generate(model, prompts, 16, GREEDY)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert written[:, longest:].tolist() == ours


@families
def test_parameters_are_counted_as_they_are(family: str) -> None:
    for tied in (False, True):
        model = model_of(family, tie_word_embeddings=tied)
        padding = len(model.head) - SIZE
        there = sum(parameter.numel() for parameter in model.parameters())
        assert there - padding * SHAPE["hidden_size"] * (1 if tied else 2) == model.params.parameters(SIZE)
        matrices = sum(parameter.numel() for name, parameter in model.named_parameters() if "proj" in name)
        assert model.params.matrix_parameters(SIZE) == matrices + model.head.numel()


def test_published_shapes_have_the_published_sizes() -> None:
    """From the models' cards: 0.6B of Qwen3 and 135M of SmolLM2 (a Llama)."""
    qwen = family_params("qwen3")(1024, 3072, 28, 16, 8, 128, 40960, 1e6, 1e-6, True)  # type: ignore[call-arg]
    assert qwen.parameters(151936) == 596_049_920
    smol = family_params("llama")(576, 1536, 30, 9, 3, 64, 8192, 1e5, 1e-5, True)  # type: ignore[call-arg]
    assert smol.parameters(49152) == 134_515_008


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads = 4"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"n_layer": 2}, "n_layer"),
        ({"rope_scaling": {**asdict(SCALING), "high_freq_factor": 1}}, "high_freq_factor: 1.0 is not greater"),
        ({"rope_scaling": {**asdict(SCALING), "factor": 0.5}}, "model.rope_scaling.factor: 0.5 must be at least 1"),
        ({"rope_scaling": {**asdict(SCALING), "beta": 1}}, "model.rope_scaling.beta is not a parameter"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    problems: list[str] = []
    parse(
        family_params("llama"), {**SHAPE, "rope_scaling": None, **changes, "architecture": "llama"}, "model", problems
    )
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', and only default and llama3"),
        (
            {"rope_parameters": {"rope_type": "llama3", "partial_rotary_factor": 0.5, **asdict(SCALING)}},
            "partial_rotary_factor is not a parameter",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rope_type is 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and 'silu' is computed here"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers without full attention"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"model_type": "qwen3"}, "q_norm.weight is missing"),
        ({"max_position_embeddings": -1}, "max_position_embeddings: -1"),
    ],
)
def test_a_config_that_says_another_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_model(model_of("llama"), GPT2_TOKENIZER, tmp_path, {})
    write_json(tmp_path / CONFIG, {**read_json(tmp_path / CONFIG), **changes})
    with pytest.raises(UserError, match=message):
        find_model(tmp_path, GPT2_TOKENIZER)


def test_scaled_positions_are_transformers_and_both_spellings_are_read(tmp_path: Path) -> None:
    import transformers

    model = model_of("llama", rope_scaling=SCALING)
    factors = slowing(model.params)  # type: ignore[arg-type]
    assert (factors == 1).any() and (factors == 32).any() and ((factors > 1) & (factors < 32)).any()  # noqa: PT018
    export_model(model, GPT2_TOKENIZER, tmp_path, {})
    config = read_json(tmp_path / CONFIG)
    both = [
        {"rope_parameters": config["rope_parameters"]},
        {key: config[key] for key in ("rope_theta", "rope_scaling")},
    ]
    for spelling in both:
        others = {key: value for key, value in config.items() if not key.startswith("rope")}
        write_json(tmp_path / CONFIG, {**others, **spelling})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens()).logits, logits_of(model, tokens()), atol=1e-5, rtol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        for folder in (tmp_path, tmp_path / "theirs"):
            back = import_model(folder, GPT2_TOKENIZER)
            assert back.params == model.params
            assert torch.equal(logits_of(back, tokens()), logits_of(model, tokens()))
    plain = model_of("llama")
    assert (logits_of(plain, tokens()) - logits_of(model, tokens())).abs().max() > 0.01
    assert torch.equal(plain.get_buffer("frequencies"), frequencies(plain.params))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen3", "arcee"])
def test_only_a_llama_has_scaled_positions(family: str, tmp_path: Path) -> None:
    export_model(model_of(family), GPT2_TOKENIZER, tmp_path, {})
    rope = {"rope_type": "llama3", "rope_theta": 1e4, **asdict(SCALING)}
    write_json(tmp_path / CONFIG, {**read_json(tmp_path / CONFIG), "rope_parameters": rope})
    with pytest.raises(UserError, match="rope_type is 'llama3', and only default is computed here"):
        find_model(tmp_path, GPT2_TOKENIZER)


def test_an_older_config_is_read(tmp_path: Path) -> None:
    model = model_of("llama")
    export_model(model, GPT2_TOKENIZER, tmp_path, {})
    config = read_json(tmp_path / CONFIG)
    for key in ("rope_parameters", "head_dim", "attention_bias"):
        del config[key]
    write_json(tmp_path / CONFIG, {**config, "rope_theta": 10000, "num_attention_heads": 3, "num_key_value_heads": 1})
    with pytest.raises(UserError, match=r"q_proj\.weight is \(32, 24\), not \(24, 24\)"):
        find_model(tmp_path, GPT2_TOKENIZER)
    write_json(tmp_path / CONFIG, {**config, "rope_theta": 10000, "head_dim": None, "hidden_size": 24})
    with pytest.raises(UserError, match="q_proj"):  # 24 / 4 = 6 numbers a head where the file has 8
        find_model(tmp_path, GPT2_TOKENIZER)
    write_json(tmp_path / CONFIG, {**config, "rope_theta": 10000, "head_dim": 8})
    assert find_model(tmp_path, GPT2_TOKENIZER).model.params == model.params
