"""Our GPT-2 is GPT-2: transformers' logits out and in, its vocabulary, its initial loss; and text drawn from it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_params import model_params
from small_project import CHECKOUT
from small_run import export_random, random_model
from torch import Tensor

from pipelib.errors import UserError
from pipelib.files import files_under
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.generate import GREEDY, Ends, Sampling, at_strings, generate
from pipelib.model.huggingface import CONFIG, WEIGHTS, export_model, import_model
from pipelib.model.kv_cache import KVCache
from pipelib.model.shapes.gpt2 import GPT2Params, GPT2Section
from pipelib.schema import read_yaml
from pipelib.vocabulary.engines import HARD_STRINGS
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

SIZES = {
    # n_layer and n_head as published and heads of 4 instead of 64, so that all proportions but the vocabulary's stay
    "124m": GPT2Params(n_layer=12, n_head=12, n_embd=48, context_length=32),
    "350m": GPT2Params(n_layer=24, n_head=16, n_embd=64, context_length=32),
    "774m": GPT2Params(n_layer=36, n_head=20, n_embd=80, context_length=32),
    "1558m": GPT2Params(n_layer=48, n_head=25, n_embd=100, context_length=32),
}
PARAMETERS = {"124m": 124_439_808, "350m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, GPT2_TOKENIZER.size, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model: GPT2, inputs: Tensor) -> Tensor:
    return model.logits(model.hidden(inputs))


def write(
    model: GPT2,
    prompt: list[int],
    new_tokens: int,
    *,
    seed: int = 0,
    stop_token_id: int | None = None,
    ends: Ends | None = None,
    **sampling: Any,
) -> list[int]:
    """The continuation of a prompt that is alone in its batch."""
    (text,) = generate(
        model, [prompt], new_tokens, Sampling(**sampling), seed=seed, stop_token_id=stop_token_id, ends=ends
    )
    return text


@pytest.fixture(scope="module")
def small() -> GPT2:
    return random_model(model_params(), tokenizer=GPT2_TOKENIZER)


@pytest.fixture(scope="module")
def exported(small: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_model(small, GPT2_TOKENIZER, folder, {})
    return folder


# ---- transformers' GPT-2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_exported_model_gives_the_same_logits_in_transformers(size: str, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    ours = random_model(SIZES[size], tokenizer=GPT2_TOKENIZER)
    export_model(ours, GPT2_TOKENIZER, tmp_path, {})
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # no tensor was missing, unexpected or misshapen
    inputs = random_tokens(2, 32)
    with torch.no_grad():
        expected = theirs.eval()(inputs).logits
    assert expected.std() > 0.1
    assert (logits_of(ours, inputs)[..., : GPT2_TOKENIZER.size] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_an_imported_model_gives_the_same_logits_as_in_transformers(size: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = SIZES[size]
    config = GPT2Config(
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, n_positions=shape.context_length
    )
    theirs = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.5 * (parameter.dim() == 1))
        theirs.save_pretrained(tmp_path)
        inputs = random_tokens(2, 32)
        expected = theirs(inputs).logits
    ours = import_model(tmp_path, GPT2_TOKENIZER)
    assert ours.params == shape
    assert (logits_of(ours, inputs)[..., : GPT2_TOKENIZER.size] - expected).abs().max() < 1e-4


def test_what_was_exported_comes_back_bit_for_bit(small: GPT2, exported: Path) -> None:
    back = import_model(exported, GPT2_TOKENIZER).state_dict()
    for name, tensor in small.state_dict().items():
        expected = tensor.clone()
        if name == "wte.weight":
            expected[GPT2_TOKENIZER.size :] = 0
        assert torch.equal(back[name], expected), name


def test_the_exported_tokenizer_gives_tiktokens_ids(exported: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, encoding = AutoTokenizer.from_pretrained(exported), GPT2_TOKENIZER
    for text in HARD_STRINGS:
        if "<|endoftext|>" not in text:  # which transformers takes for the special token, and encode_ordinary for text
            assert tokenizer(text)["input_ids"] == encoding.encode(text), text
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id] == [encoding.end_token_id]


def test_equal_weights_export_to_equal_bytes(exported: Path, tmp_path: Path) -> None:
    export_random(tmp_path, model_params(), tokenizer=GPT2_TOKENIZER)
    names = [path.relative_to(exported) for path in files_under(exported)]
    assert names == [path.relative_to(tmp_path) for path in files_under(tmp_path)]
    assert [name for name in names if (exported / name).read_bytes() != (tmp_path / name).read_bytes()] == []


# ---- Folders that are no model of ours -------------------------------------------------------------------------------


def change_config(**changes: Any) -> Callable[[Path], object]:
    """Write other values into config.json."""

    def change(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return change


def flip_header_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[20] ^= 0xFF
    (folder / WEIGHTS).write_bytes(data)


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors is missing"),
    "weights cut short": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        "model.safetensors is damaged",
    ),
    "a flipped byte": (flip_header_byte, "model.safetensors is damaged"),
    "a tensor missing": (drop_a_tensor, "h.1.mlp.c_fc.bias is missing"),
    "another shape": (change_config(n_embd=32), "does not fit its config.json"),
    "more blocks": (change_config(n_layer=3), "it has 2 blocks, and n_layer is 3"),
    "no shape": (change_config(n_layer="two"), "does not describe a GPT-2"),
    "another architecture": (change_config(model_type="mamba"), "model_type = 'mamba'"),
    "another vocabulary": (change_config(vocab_size=32000), "vocab_size = 32000"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "config.json does not exist"),
    "a torn config": (lambda folder: (folder / CONFIG).write_text('{"model_type"'), "config.json is not JSON"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused_and_says_why(exported: Path, tmp_path: Path, case: str) -> None:
    spoil, message = BAD_FOLDERS[case]
    for path in files_under(exported):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        import_model(tmp_path, GPT2_TOKENIZER)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder with a model"):
        import_model(tmp_path / "nowhere", GPT2_TOKENIZER)


# ---- Weights and loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_presets_have_the_published_numbers_of_parameters(size: str) -> None:
    shape = GPT2Section(**read_yaml(CHECKOUT / f"presets/gpt2-{size}.yaml")["model"])
    assert shape.parameters(GPT2_TOKENIZER.size) == PARAMETERS[size]


@pytest.mark.parametrize("size", SIZES)
def test_the_formula_counts_the_parameters_that_are_there(size: str) -> None:
    params = SIZES[size]
    padding = (GPT2_TOKENIZER.padded_size - GPT2_TOKENIZER.size) * params.n_embd
    assert (
        params.parameters(GPT2_TOKENIZER.size)
        == sum(parameter.numel() for parameter in GPT2(params, GPT2_TOKENIZER.size).parameters()) - padding
    )


def test_the_initial_loss_is_that_of_a_uniform_guess() -> None:
    model = GPT2(model_params(n_layer=4, n_head=4, n_embd=128, context_length=64), GPT2_TOKENIZER.size)
    model.initialise(1337)
    tokens = random_tokens(4, 65)
    assert abs(model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean().item() - math.log(GPT2_TOKENIZER.size)) < 0.1


def test_initial_weights_have_gpt2s_spread_and_follow_from_the_seed() -> None:
    first, again, other = (GPT2(SIZES["124m"], GPT2_TOKENIZER.size) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        torch.manual_seed(seed + 100)  # torch's own stream has no part in them
        model.initialise(seed)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other.state_dict()[name]), name
            std = 0.02 / math.sqrt(24) if name.endswith("c_proj.weight") else 0.02
            assert tensor[: GPT2_TOKENIZER.size].std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert set(tensor.tolist()) == {1.0 if "ln_" in name and name.endswith("weight") else 0.0}, name


def test_padding_has_probability_zero_even_where_its_weights_are_great(small: GPT2) -> None:
    model = GPT2(small.params, GPT2_TOKENIZER.size)
    model.load_state_dict(small.state_dict())
    with torch.no_grad():
        model.wte.weight[GPT2_TOKENIZER.size :] = 100.0
    probabilities = logits_of(model, random_tokens(2, 16)).softmax(dim=-1)
    assert probabilities[..., GPT2_TOKENIZER.size :].eq(0).all()
    assert probabilities.sum(dim=-1).allclose(torch.ones(2, 16))
    drawn = write(model, [1, 2, 3], 100, temperature=100.0, top_k=None, seed=4)
    drawn += write(model, [1, 2, 3], 100, temperature=100.0, top_k=10**9, seed=5)
    assert max(drawn) < GPT2_TOKENIZER.size


def test_padding_gets_no_gradient(small: GPT2) -> None:
    small.zero_grad()
    tokens = random_tokens(2, 17)
    small.token_losses(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    gradient = small.wte.weight.grad
    small.zero_grad()
    assert gradient is not None
    assert gradient[GPT2_TOKENIZER.size :].eq(0).all()
    assert gradient[: GPT2_TOKENIZER.size].ne(0).any()


def test_no_position_sees_what_comes_after_it(small: GPT2) -> None:
    tokens = random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9:] += 1
    before, after = logits_of(small, tokens), logits_of(small, changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


# ---- Text ------------------------------------------------------------------------------------------------------------


def greedy(model: GPT2, token_ids: list[int], count: int) -> list[int]:
    """The likeliest token, again and again, written out."""
    for _ in range(count):
        window = torch.tensor([token_ids[-model.params.context_length :]])
        token_ids = [*token_ids, int(logits_of(model, window)[0, -1].argmax())]
    return token_ids[-count:]


def test_temperature_zero_takes_the_likeliest_token_also_beyond_the_context(small: GPT2) -> None:
    prompt = random_tokens(1, 10)[0].tolist()
    assert write(small, prompt, 20, temperature=0) == greedy(small, prompt, 20)


def test_a_long_prompt_counts_with_its_end_alone(small: GPT2) -> None:
    prompt = random_tokens(1, 50)[0].tolist()
    assert write(small, prompt, 5, seed=1) == write(small, prompt[-small.params.context_length :], 5, seed=1)


def test_the_seed_alone_decides_a_text_and_torchs_own_stream_is_left_alone(small: GPT2) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = write(small, [5], 30, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert write(small, [5], 30, seed=1) == first
    assert write(small, [5], 30, seed=2) != first


def test_top_k_draws_among_the_likeliest_only(small: GPT2) -> None:
    likeliest = logits_of(small, torch.tensor([[5]]))[0, -1].topk(3).indices.tolist()
    drawn = {write(small, [5], 1, temperature=10.0, top_k=3, seed=seed)[0] for seed in range(40)}
    assert drawn == set(likeliest)


def test_draws_follow_the_models_probabilities(small: GPT2) -> None:
    values, tokens = logits_of(small, torch.tensor([[5]]))[0, -1].topk(3)
    expected = (values / 2.0).softmax(dim=-1)
    draws = [write(small, [5], 1, temperature=2.0, top_k=3, seed=seed)[0] for seed in range(1000)]
    shares = torch.tensor([draws.count(token) / 1000 for token in tokens.tolist()])
    assert (shares - expected).abs().max() < 0.06  # four standard deviations of a share of 1,000


def test_a_text_ends_before_the_stop_token(small: GPT2) -> None:
    text = write(small, [5], 30, seed=1)
    assert write(small, [5], 30, seed=1, stop_token_id=text[7]) == text[: text.index(text[7])]


@pytest.fixture(scope="module")
def wide() -> GPT2:
    """A model with room for texts of different lengths."""
    return random_model(model_params(context_length=48), tokenizer=GPT2_TOKENIZER)


PROMPTS = [random_tokens(1, 40)[0, :length].tolist() for length in (9, 1, 23, 4)]


def test_greedy_texts_of_a_batch_are_those_of_transformers_padded_left_and_alone(wide: GPT2, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    export_model(wide, GPT2_TOKENIZER, tmp_path, {})
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def continued(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        inputs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        written: Tensor = theirs.generate(inputs, attention_mask=mask, **options)
        return written[:, longest:].tolist()

    ours = generate(wide, PROMPTS, 20, GREEDY)
    assert ours == continued(PROMPTS)
    assert ours == [continued([prompt])[0] for prompt in PROMPTS]
    assert len(set(map(tuple, ours))) == len(ours)


@torch.no_grad()
def next_logits(model: GPT2, texts: list[list[int]]) -> Tensor:
    """Without a cache."""
    return torch.cat([model.exact_logits(model.hidden(torch.tensor([text]))[:, -1]) for text in texts])


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_the_cache_gives_the_logits_of_the_whole_text_at_every_token(wide: GPT2, fixed_shapes: bool) -> None:
    texts = list(map(list, PROMPTS))
    cache = KVCache(wide, 6, 48, fixed_shapes=fixed_shapes)
    found = cache.add(texts)
    for step in range(20):
        assert (found - next_logits(wide, texts))[:, : wide.vocab_size].abs().max() < 1e-4
        if step == 7:
            cache.remove(1)
            texts[1] = texts.pop()
        for number, text in enumerate(texts):
            text.append(100 * number + step)
        found = cache.step([text[-1] for text in texts])


def test_a_prompt_alone_has_the_very_logits_of_the_training_pass(wide: GPT2) -> None:
    assert torch.equal(KVCache(wide, 1, 23).add([PROMPTS[2]]), next_logits(wide, [PROMPTS[2]]))


def test_with_fixed_shapes_neighbours_change_no_bit(wide: GPT2) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prompt, others = PROMPTS[2], [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
        alone = KVCache(wide, 8, 64, fixed_shapes=True)
        expected = [alone.add([prompt]), *(alone.step([token]) for token in range(12))]
        cache = KVCache(wide, 8, 64, fixed_shapes=True)
        cache.add(others[:2])
        cache.step([7, 8])
        found = [cache.add([prompt])]
        cache.remove(0)  # this text is in row 0 now
        for token in range(12):
            if token == 5:
                cache.add(others[2:])
            found.append(cache.step([token, *[99] * (len(cache) - 1)])[:1])
        assert all(map(torch.equal, expected, found))
    finally:
        torch.set_num_threads(threads)


def test_texts_of_a_batch_outgrow_the_context_one_after_the_other(small: GPT2) -> None:
    prompts = [*PROMPTS, random_tokens(1, 50)[0].tolist()]  # two of them are longer than the context from the start
    texts = generate(small, prompts, 30, GREEDY)
    assert texts == [greedy(small, prompt, 30) for prompt in prompts]


def test_a_text_does_not_hang_on_what_it_is_written_with(wide: GPT2) -> None:
    together = generate(wide, PROMPTS, 60, seed=3)
    assert together == [write(wide, prompt, 60, seed=3 + number) for number, prompt in enumerate(PROMPTS)]
    many = generate(wide, PROMPTS * 9, 5, seed=3)  # more than are written at a time
    assert len(many) == 36
    assert many[:4] == [text[:5] for text in together]
    assert generate(wide, [], 5) == []


def test_a_text_that_ends_leaves_the_others_alone(wide: GPT2) -> None:
    texts = generate(wide, PROMPTS, 30, seed=3)
    stop = texts[0][5]
    ended = generate(wide, PROMPTS, 30, seed=3, stop_token_id=stop)
    assert ended == [text[: text.index(stop)] if stop in text else text for text in texts]
    assert len(ended[0]) <= 5


def test_top_p_draws_among_the_fewest_likeliest_that_have_it_together(small: GPT2) -> None:
    probabilities, tokens = (logits_of(small, torch.tensor([[5]]))[0, -1] / 0.5).softmax(dim=-1).sort(descending=True)
    for top_p, count in ((probabilities[0] / 2, 1), (probabilities[:3].sum() - 1e-4, 3)):
        options = {"temperature": 0.5, "top_k": None, "top_p": float(top_p)}
        drawn = {write(small, [5], 1, seed=seed, **options)[0] for seed in range(200)}
        assert drawn <= set(tokens[:count].tolist())
        assert drawn >= set(tokens[: min(count, 2)].tolist())
    everything = [write(small, [5], 40, top_k=None, top_p=top_p, seed=2) for top_p in (None, 1.0)]
    assert everything[0] == everything[1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": None},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.6},
        {"temperature": 1.3, "top_k": None, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.3, "repetition_penalty": 1.4},
        {"temperature": 0.9, "top_k": None, "repetition_penalty": 0.7},
    ],
)
def test_candidates_have_the_probabilities_of_transformers(options: dict[str, Any]) -> None:
    from transformers.generation import logits_process as theirs

    generator = torch.Generator().manual_seed(4)
    sampling, text = Sampling(**options), [3, 5, 5, 90]
    steps: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    steps += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
    steps += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for _ in range(50):
        logits = torch.randn(100, generator=generator) * 3
        scores = logits[None].clone()
        for step in steps:
            scores = step(torch.tensor([text]), scores)
        token_ids, shares = sampling.candidates(sampling._penalised(logits, text))
        ours = torch.zeros(100).index_copy(0, token_ids, shares / shares.sum())
        assert torch.allclose(ours, scores[0].softmax(dim=-1), atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(2.0, None), Sampling(2.0, 5)])
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling) -> None:
    generator, logits = torch.Generator().manual_seed(3), torch.tensor([1.0, -300.0, 3.0, 0.0, -1.0])
    counts = torch.tensor([sampling.draw(logits, [], generator) for _ in range(4000)]).bincount(minlength=5)
    expected = 4000 * (logits / 2).softmax(dim=-1)
    assert counts[1] == 0
    assert ((counts - expected).abs() <= 4 * expected.sqrt()).all(), counts


def test_a_text_ends_at_a_string_and_keeps_the_tokens_that_complete_it(small: GPT2) -> None:
    ends = at_strings(GPT2_TOKENIZER, ["the end", "日本"])
    for text, last in (
        ("It is the end of it", " end"),
        ("now 日本 and", GPT2_TOKENIZER.decode(GPT2_TOKENIZER.encode("日本")[-1:])),
    ):
        tokens = GPT2_TOKENIZER.encode(text)
        first = next(count for count in range(1, len(tokens) + 1) if ends(tokens[:count]))
        assert GPT2_TOKENIZER.decode(tokens[first - 1 : first]) == last
        assert not any(ends(tokens[:count]) for count in range(1, first))
    whole = write(small, [5], 20, temperature=0.0)
    stop = GPT2_TOKENIZER.decode(whole[3:4])
    assert (
        write(small, [5], 20, temperature=0.0, ends=at_strings(GPT2_TOKENIZER, [stop]))
        == whole[: whole.index(whole[3]) + 1]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_p": 1.5}, "min_p 1.5 is not a share from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0 is not a number from 0.01 to 100"),
    ],
)
def test_impossible_sampling_is_refused_at_once(small: GPT2, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        write(small, [5], 1, **options)


def test_top_p_counts_what_top_k_left(small: GPT2) -> None:
    values, tokens = logits_of(small, torch.tensor([[5]]))[0, -1].topk(2)
    share = values.softmax(dim=-1)[0].item()  # of the first among the two
    assert {write(small, [5], 1, top_k=2, top_p=share - 0.01, seed=seed)[0] for seed in range(40)} == {tokens[0].item()}
    drawn = {write(small, [5], 1, top_k=2, top_p=share + 0.01, seed=seed)[0] for seed in range(40)}
    assert drawn == set(tokens.tolist())


def test_the_least_temperature_is_greedy(small: GPT2) -> None:
    assert write(small, [5], 12, temperature=1e-38) == greedy(small, [5], 12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_is_refused(small: GPT2, value: float) -> None:
    model = GPT2(small.params, GPT2_TOKENIZER.size)
    model.load_state_dict(small.state_dict())
    with torch.no_grad():
        model.ln_f.bias[0] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="infinite or not numbers"):
            write(model, [5], 3, temperature=temperature)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1], {"temperature": -1.0}, "is negative"),
        ([1], {"temperature": math.nan}, "temperature nan is not a finite number"),
        ([1], {"top_k": 0}, "no token to draw"),
        ([1], {"top_p": 0.0}, "top_p 0 is not a probability above 0"),
        ([1], {"top_p": 1.5}, "top_p 1.5 is not a probability above 0"),
        ([1], {"seed": -1}, "seed -1 is out of range"),
        ([1], {"seed": 2**63}, "seed 9223372036854775808 is out of range"),
    ],
)
def test_what_means_nothing_is_refused(small: GPT2, prompt: list[int], options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(small, prompt, 1, **options)
