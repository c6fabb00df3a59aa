"""`pipelib export`: a GGUF file, and what llama.cpp itself makes of it, where `xllamacpp` is installed."""

import json
import random
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from small_corpus import make_texts
from small_vocabulary import TOKENIZER

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.files import sha256_file
from pipelib.inspection.gguf_file import export_gguf
from pipelib.model.decoder import Decoder, build
from pipelib.model.generate import GREEDY, generate
from pipelib.model.huggingface import export_model
from pipelib.model.params import family_params
from pipelib.model.rotary_params import RopeScaling
from pipelib.vocabulary.bpe import train_bpe
from pipelib.vocabulary.chat import ChatTemplate, Message
from pipelib.vocabulary.engines import HARD_STRINGS
from pipelib.vocabulary.folder import read_tokenizer
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.tokenizer import PATTERNS, Tokenizer

ROTARY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "context_length": 256, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 256},
    "llama": {**ROTARY, "tie_word_embeddings": False},
    "llama, scaled": {**ROTARY, "tie_word_embeddings": False, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)},
    "qwen3": {**ROTARY, "tie_word_embeddings": False},
    "arcee": {**ROTARY, "tie_word_embeddings": True},
}
PIECES = [
    "don't", "WE'LL", "'s", "ſ", "1234567", " 12 ", "\n", "\r\n", " ", "  ", "\t", "é", "日本", "中文字", "\u0301", "\u200b",
    "\u00a0", "\u3000", "<|endoftext|>", "<|im_start|>", "abc", " the", "...", "!?", "_", "½", "हिन्दी", "עברית", "'re", "’s",
    "a\n\n\n", "   end", "👩‍👩‍👧",
]  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", SHAPES)
VOCABULARIES = ("gpt2", *(f"own, {rule}" for rule in PATTERNS))


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_named(request.param, tmp_path_factory.mktemp("vocabulary"))


def tokenizer_named(name: str, folder: Path) -> Tokenizer:
    if name == "gpt2":
        return GPT2_TOKENIZER
    rule: Any
    _, rule, *plain = name.split(", ")
    special = () if plain else ("<|im_start|>", "<|im_end|>")
    params = VocabularyParams("train", 500, rule, special, 10**6, "auto")
    (folder / "tokenizer.json").write_bytes(train_bpe([*make_texts(400, words=60), *PIECES * 3], params))
    return read_tokenizer(folder)


def model_of(family: str, size: int) -> Decoder:
    """Weights that are large enough for confident, varied tokens."""
    model = build(family_params(family.split(",")[0])(**SHAPES[family]), size)
    model.initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3.0 if name in model.embedding_names else 12.0)
        model.head[size - 3 :] = 0.0  # special tokens are never the likeliest: llama.cpp would end the text
    return model.eval()


def exported(family: str, tokenizer: Tokenizer, folder: Path, kind: Any = "f32") -> tuple[Decoder, Path]:
    model = model_of(family, tokenizer.size)
    export_model(model, tokenizer, folder / "model", {"data": {"fingerprint": "abc"}})
    export_gguf(folder / "model", folder / "model.gguf", kind, tokenizer)
    return model, folder / "model.gguf"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields and the tensors of a file. To read the tokens and merges of GPT-2 takes a second."""
    reader = gguf.GGUFReader(path)
    return dict(reader.fields), {tensor.name: tensor for tensor in reader.tensors}


# ---- The file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [
        # GPT-2's is large, and written for every family alike
        pytest.param(family, name, marks=pytest.mark.long if name == "gpt2" != family else ())
        for family in SHAPES
        for name in VOCABULARIES
    ],
    indirect=["tokenizer"],
)
def test_the_file_has_the_model_and_its_vocabulary(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = exported(family, tokenizer, tmp_path)
    fields, tensors = read(path)
    assert fields["general.architecture"].contents() == model.architecture
    assert len(fields["tokenizer.ggml.tokens"].data) == tokenizer.size
    assert fields["tokenizer.ggml.tokens"].contents(tokenizer.end_token_id) == "<|endoftext|>"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert {number for number, kind in enumerate(types) if kind == 3} == set(tokenizer.special_tokens.values())
    assert len(fields["tokenizer.ggml.merges"].data) == len(tokenizer.ranks()) - 256
    assert fields["pipelib.weights_sha256"].contents() == sha256_file(tmp_path / "model/model.safetensors")
    assert ("rope_freqs.weight" in tensors) == ("scaled" in family)
    count = sum(int(np.prod(tensor.shape)) for name, tensor in tensors.items() if name != "rope_freqs.weight")
    assert count == model.params.parameters(tokenizer.size)
    again = tmp_path / "again.gguf"
    export_gguf(tmp_path / "model", again, "f32", tokenizer)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "tokenizer",
    # GPT-2's has no tokens of the template either, and takes seconds to write
    [pytest.param("gpt2", marks=pytest.mark.long), *VOCABULARIES[1:], "own, gpt2, plain"],
    indirect=True,
)
def test_a_model_that_answers_has_its_template_and_the_token_that_ends_an_answer(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate.of(tokenizer)
    export_model(model_of("qwen3", tokenizer.size), tokenizer, tmp_path / "model", {}, template)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32", tokenizer)
    fields, _ = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == template.stop_token_id
    messages = [
        {"role": "user", "content": " Why? "},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "x"},
    ]
    written = jinja2.Template(fields["tokenizer.chat_template"].contents())
    rendered = written.render(messages=messages, add_generation_prompt=True)
    own = template.prompt([Message(entry["role"], entry["content"]) for entry in messages])
    assert tokenizer.encode(rendered, with_special=True) == own


@pytest.mark.long
def test_types_are_what_was_asked_for_but_where_rows_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for kind, wanted in (("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0")):
        (tmp_path / kind).mkdir()
        _, path = exported("gpt2", GPT2_TOKENIZER, tmp_path / kind, kind)
        _, tensors = read(path)
        assert tensors["blk.0.ffn_up.weight"].tensor_type.name == wanted
        assert (
            tensors["position_embd.weight"].tensor_type.name == tensors["output_norm.weight"].tensor_type.name == "F32"
        )
        sizes[kind] = path.stat().st_size
    assert sizes["f32"] > 1.5 * sizes["f16"] > 2 * sizes["q8_0"]
    said = capsys.readouterr().out
    assert "stay f16" not in said
    assert said.count("SHA-256 ") == 3
    (tmp_path / "odd").mkdir()
    model = build(family_params("gpt2")(n_layer=1, n_head=4, n_embd=48, context_length=16), GPT2_TOKENIZER.size)
    model.initialise(1)
    export_model(model, GPT2_TOKENIZER, tmp_path / "odd/model", {})
    export_gguf(tmp_path / "odd/model", tmp_path / "odd.gguf", "q8_0", GPT2_TOKENIZER)
    assert "4 matrices stay f16, since their rows are no multiples of 32 numbers" in capsys.readouterr().out


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported("gpt2", TOKENIZER, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(UserError, match=r"full\.gguf cannot be written \(No space left on device\)"):
        export_gguf(tmp_path / "model", tmp_path / "full.gguf", "f32", TOKENIZER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported("arcee", TOKENIZER, tmp_path)
    out = tmp_path / "new/m.gguf"
    assert main(["export", "--model", str(tmp_path / "model"), "--type", "f16", "--out", str(out)]) == 0
    assert f"{out}: " in capsys.readouterr().out
    assert main(["export", "--model", str(tmp_path / "none"), "--out", str(out)]) == 1


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


@contextmanager
def llama(path: Path) -> Iterator[Any]:
    """llama.cpp with this model: a function that asks it. Its cache is in fp32, and flash attention is off."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install '.[llamacpp]'")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
    params.cpuparams.n_threads, params.port, params.verbosity = 1, 0, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(place: str, **request: Any) -> Any:
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(server.listening_address + place, data, headers)) as answer:
            return json.load(answer)

    yield ask


def hard_strings(count: int) -> list[str]:
    draw = random.Random(5)
    return [*filter(None, HARD_STRINGS), *("".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(count))]


@pytest.mark.long
@FAMILIES
def test_llama_cpp_has_our_ids_and_our_greedy_text(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = exported(family, tokenizer, tmp_path)
    prompt = tokenizer.encode("The gradient of the data")
    (ours,) = generate(model, [prompt], 64, GREEDY)
    with llama(path) as ask:
        differing = [
            text
            for text in hard_strings(1000)
            if ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
            != tokenizer.encode(text)
        ]
        assert differing == []
        answer = ask(
            "/completion", prompt=prompt, n_predict=64, temperature=0, return_tokens=True, ignore_eos=True,
            cache_prompt=False, samplers=["temperature"],
        )  # fmt: skip
    first = next(
        (place for place, pair in enumerate(zip(ours, answer["tokens"], strict=True)) if len({*pair}) > 1), None
    )
    if first is not None:  # llama.cpp looks GELU up in a table of fp16, so two tokens may change places
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([prompt + ours[:first]])))[0, -1]
        assert family == "gpt2"
        assert logits[ours[first]] - logits[answer["tokens"][first]] < 2e-3


def is_whole(tokenizer: Tokenizer, number: int) -> bool:
    """Whether a token is whole characters and not a part of one."""
    return "\ufffd" not in tokenizer.decode([number])


@pytest.mark.long
@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-5), ("f16", 1e-3), ("q8_0", 1e-2)])
@FAMILIES
def test_losses_in_llama_cpp_are_ours(family: str, kind: Any, most: float, tmp_path: Path) -> None:
    """Of the token that comes next, at places all over a text."""
    tokenizer = tokenizer_named("own, gpt2", tmp_path)
    model, path = exported(family, tokenizer, tmp_path, kind)
    count = 20_000
    ascii_token = tokenizer.encode("a")[0]
    ids = [number for text in make_texts(200, seed=9) for number in tokenizer.encode(text)][: count + count // 100 + 8]
    ours, theirs = [], []
    with llama(path) as ask:
        for start in range(0, count, 200):
            row = ids[start : start + 201]
            with torch.no_grad():
                losses = model.token_losses(torch.tensor([row[:-1]]), torch.tensor([row[1:]]))[0].tolist()
            for length in range(1, len(row)):
                # The bias makes it write the token that follows, and the answer has its probability without the bias. If the
                # token is not a whole character it has none, so another is written, with the probabilities of all.
                write, count_of = (
                    (row[length], 1) if is_whole(tokenizer, row[length]) else (ascii_token, tokenizer.size)
                )
                answer = ask(
                    "/completion", prompt=row[:length], n_predict=1, temperature=0, n_probs=count_of, cache_prompt=True,
                    samplers=["temperature"], logit_bias=[[write, 1000.0]],
                )  # fmt: skip
                (written,) = answer["completion_probabilities"]
                found = {entry["id"]: entry["logprob"] for entry in (*written["top_logprobs"], written)}
                ours.append(losses[length - 1])
                theirs.append(-found[row[length]])
    first, second = sum(ours) / len(ours), sum(theirs) / len(theirs)
    print(
        f"{family}, {kind}: {first:.6f} here, {second:.6f} in llama.cpp, {abs(second / first - 1):.2e} on {len(ours)} tokens"
    )
    assert abs(second / first - 1) < most
