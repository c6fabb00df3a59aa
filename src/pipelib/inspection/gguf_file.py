"""Write a model as GGUF, the file of llama.cpp, Ollama and LM Studio, with PyPI's `gguf`.

llama.cpp's own converter recognises tokenizers by a hash of their ids and so refuses a vocabulary of one's own. Here the name
of the pre-tokenizer is written, and llama.cpp encodes every text as the training did.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError, tell
from pipelib.files import format_bytes, require_free_space, sha256_file, sync_folder
from pipelib.model.decoder import HEAD, Decoder
from pipelib.model.huggingface import import_model, read_chat_template
from pipelib.model.recipe import read_recipe
from pipelib.model.rotary import slowing
from pipelib.model.rotary_params import RotaryParams
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.model.weights import weights_sha256
from pipelib.vocabulary.chat import ChatTemplate
from pipelib.vocabulary.choice import tokenizer_of_model
from pipelib.vocabulary.folder import TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer, byte_characters

if TYPE_CHECKING:
    from gguf import GGUFWriter

Kind = Literal["f32", "f16", "q8_0"]
_PRE_TOKENIZERS = {"gpt2": "gpt-2", "gpt4": "llama-bpe", "qwen2": "qwen2"}
"""llama.cpp's names for the pre-tokenizers."""
_TURNS_NEIGHBOURS = ("llama", "arcee")
"""Families whose rotary positions turn neighbouring numbers in llama.cpp, where Hugging Face turns numbers half a head apart."""
_POSITIONS = "position_embd.weight"
_Q8_BLOCK = 32
"""Numbers that share a scale in q8_0; rows must be multiples of it."""
_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


def export_gguf(folder: Path, out: Path, kind: Kind, otherwise: Tokenizer) -> None:
    """Write the model in a Hugging Face folder as one GGUF file.

    Args:
        folder: the model.
        out: the file; it exists only when it is complete.
        kind: the type of the matrices. Norms, biases and learned positions stay fp32.
        otherwise: the tokenizer of a model without one.

    Raises:
        UserError: the folder cannot be read, GGUF cannot hold the model, or the disk is full.
    """
    tokenizer = tokenizer_of_model(folder, otherwise)
    model = import_model(folder, tokenizer)
    if not isinstance(model.params, RotaryParams | GPT2Params):
        raise UserError(
            f"{folder} is a {model.params.title}, which llama.cpp does not know, so nothing was written; export a model of "
            "another family."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(out.parent, int(_BYTES[kind] * model.params.parameters(model.vocab_size)), "the export")
    part = out.with_name(f".{out.name}.tmp")
    try:
        kept = _write(model, tokenizer, folder, part, kind)
        part.replace(out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}), so there is no file; free space, or name another place."
        ) from None
    finally:
        part.unlink(missing_ok=True)
    sync_folder(out.parent)
    if kept:
        tell(
            f"export: {len(kept)} matrices stay f16, since their rows are no multiples of {_Q8_BLOCK} numbers: "
            f"{', '.join(kept[:3])}"
        )
    tell(f"export: {out}: {format_bytes(out.stat().st_size)}, {kind}, SHA-256 {sha256_file(out)}")


def _write(model: Decoder, tokenizer: Tokenizer, folder: Path, path: Path, kind: Kind) -> list[str]:
    """Write the file, and return the matrices that could not have the wanted type."""
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    _add_shape(writer, model.params)
    writer.add_vocab_size(model.vocab_size)
    template = read_chat_template(folder)
    chat = ChatTemplate.of(tokenizer)
    _add_tokenizer(writer, tokenizer, chat.stop_token_id if template == chat.jinja else tokenizer.end_token_id)
    _add_chat_template(writer, template)
    _add_origin(writer, model, folder)
    kept = []
    for name, values in _tensors(model):
        wanted = gguf.GGMLQuantizationType[kind.upper()]
        if values.ndim < 2 or name == _POSITIONS or kind == "f32":
            writer.add_tensor(name, values)
            continue
        if kind == "q8_0" and values.shape[-1] % _Q8_BLOCK:
            wanted = gguf.GGMLQuantizationType.F16
            kept.append(name)
        writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return kept


def _add_shape(writer: "GGUFWriter", params: object) -> None:
    match params:
        case GPT2Params():
            writer.add_context_length(params.context_length)
            writer.add_embedding_length(params.n_embd)
            writer.add_block_count(params.n_layer)
            writer.add_head_count(params.n_head)
            writer.add_feed_forward_length(4 * params.n_embd)
            writer.add_layer_norm_eps(1e-5)
        case RotaryParams():
            writer.add_context_length(params.context_length)
            writer.add_embedding_length(params.hidden_size)
            writer.add_block_count(params.num_hidden_layers)
            writer.add_head_count(params.num_attention_heads)
            writer.add_head_count_kv(params.num_key_value_heads)
            writer.add_feed_forward_length(params.intermediate_size)
            writer.add_layer_norm_rms_eps(params.rms_norm_eps)
            writer.add_rope_freq_base(params.rope_theta)
            writer.add_rope_dimension_count(params.head_dim)
            writer.add_key_length(params.head_dim)
            writer.add_value_length(params.head_dim)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer, stop_token_id: int) -> None:
    """Write the tokens by id, their types, and the merges in order.

    Args:
        stop_token_id: ends what the model writes: a text, or an answer.
    """
    import gguf

    character_of = {byte: character for character, byte in byte_characters().items()}
    tokens = [""] * tokenizer.size
    for token, number in tokenizer.ranks().items():
        tokens[number] = "".join(character_of[byte] for byte in token)
    types = [gguf.TokenType.NORMAL] * tokenizer.size
    for spelling, number in tokenizer.special_tokens.items():
        tokens[number], types[number] = spelling, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(_PRE_TOKENIZERS[tokenizer.pre_tokenizer])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(tokenizer.end_token_id)
    writer.add_eos_token_id(stop_token_id)
    writer.add_add_bos_token(False)


def _add_chat_template(writer: "GGUFWriter", template: str) -> None:
    """Write the chat template of a fine-tuned model."""
    if template:
        # the marks of what is trained mean nothing here, and not every reader of templates knows them
        writer.add_chat_template(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))


def _merges(tokenizer: Tokenizer) -> list[str]:
    files = tokenizer.files(0)
    if "merges.txt" in files:
        return files["merges.txt"].decode("utf-8").split("\n")[1:-1]  # the first line is the version
    merges = json.loads(files[TOKENIZER])["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _add_origin(writer: "GGUFWriter", model: Decoder, folder: Path) -> None:
    """Write the name and what the file was made from."""
    writer.add_name(f"{model.params.title}, {model.params.parameters(model.vocab_size):,} parameters")
    writer.add_string("pipelib.weights_sha256", weights_sha256(folder))
    for key, value in read_recipe(folder).items():
        if key.startswith("data"):
            writer.add_string(f"pipelib.{key.replace(' ', '_')}", str(value))


def _tensors(model: Decoder) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the tensors under GGUF's names. Matrices are (out, in), as ours."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model.architecture)
    blocks = getattr(model.params, model.block_list[1]) if model.block_list else 0
    names = gguf.get_tensor_name_map(architecture, blocks)
    for ours, tensor in model.state_dict().items():
        theirs = ours if ours == HEAD else model.name_prefix + ours
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf has no name for {theirs}"
        if ours in model.embedding_names:
            tensor = tensor[: model.vocab_size]
        values: npt.NDArray[np.float32] = tensor.detach().float().numpy()
        yield name, np.ascontiguousarray(_turned(values, ours, model.params))
    if isinstance(model.params, RotaryParams) and model.params.scaling:
        yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", slowing(model.params).numpy()


def _turned(values: npt.NDArray[np.float32], name: str, params: Any) -> npt.NDArray[np.float32]:
    """Put the numbers of each query and key head into the order in which llama.cpp turns them."""
    if params.architecture not in _TURNS_NEIGHBOURS or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    halves = values.reshape(-1, 2, params.head_dim // 2, values.shape[1])  # (heads, half, number, in)
    return halves.swapaxes(1, 2).reshape(values.shape)
