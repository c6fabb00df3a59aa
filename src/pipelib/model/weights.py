"""The weight files of a Hugging Face folder: `model.safetensors`, or several files and their index.

Names and shapes come from the files' headers, so that a folder that does not fit is refused before a tensor is read. If there
are no such files, the message says what the folder has instead and which command converts it.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelib.corpus.published_models import PUBLISHED_MODELS, WEIGHTS, folder_name, hash_of_weights
from pipelib.errors import UserError, how_to_repair
from pipelib.files import plural, read_json, sha256_files
from pipelib.workspace.places import HERE, MANIFEST

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MODELS, OWN_MODEL, CHAT = HERE.published_models, HERE.model, HERE.chat
"""The published models that download fetches, the model that train makes, and what finetune makes."""
GUIDE = "docs/how-to/initial-weights.md"
CONVERT = (
    "python -c 'import sys, transformers; [transformers.GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder) "
    "for folder in sys.argv[1:]]'"
)
"""The command that writes `model.safetensors` beside the other formats that transformers reads; the folder comes after it."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file that has not been read yet."""

    file: Path
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""


class Weights:
    """The open files of a folder."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._files = files
        self.entries = tuple(
            Entry(path, name, tuple(part.get_shape()), str(part.get_dtype()))
            for path, file in files.items()
            for name in file.keys()  # noqa: SIM118 (not a mapping)
            for part in [file.get_slice(name)]  # reads the header only
        )

    def read(self, entry: Entry) -> "Tensor":
        """Read a tensor unchanged. It is memory-mapped to its file."""
        tensor: Tensor = self._files[entry.file].get_tensor(entry.name)
        return tensor


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Open the weights of a folder.

    Raises:
        UserError: there are none, a file is damaged, or the index does not match the files.
    """
    paths = weight_files(folder)
    with ExitStack() as stack:
        weights = Weights({path: stack.enter_context(_open(path)) for path in paths})
        if paths != [folder / WEIGHTS]:
            _check_index(folder, weights)
        yield weights


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}), so there are no weights; make it a file that you can read."
        ) from None
    except SafetensorError as error:
        what = by_first_bytes(path) or f"is damaged ({error}), so its weights cannot be trusted; {restore(path.parent)}"
        raise UserError(f"{path} {what}.") from None


def is_file(path: Path) -> bool:
    """Whether a path is a file; false also if it cannot be looked at."""
    return os.path.isfile(path)  # noqa: PTH113 (Path's raises if a name is too long or a folder cannot be read)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (likewise)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, in order. `model.safetensors` wins over an index, as in transformers.

    Raises:
        UserError: there are none.
    """
    if is_file(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if not is_file(folder / INDEX):
        raise UserError(f"{folder / WEIGHTS} is missing, so there are no weights; {_instead(folder)}.")
    names = sorted(set(_weight_map(folder).values()))
    if missing := [name for name in names if not is_file(folder / name)]:
        raise UserError(
            f"{folder / INDEX} names {plural(len(names), 'file')} of weights, and {len(missing)} of them are missing (the "
            f"first is {missing[0]}), so the model is incomplete; {restore(folder)}."
        )
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor according to the index. Every file must be beside the index."""
    path = folder / INDEX
    found = read_json(path, restore(folder)).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} has no weight_map, so the files of the weights are unknown; {restore(folder)}.")
    for file in found.values():
        # A name with a path could point out of the folder.
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise UserError(
                f"{path} names {file!r}, which is not a .safetensors file beside it, so it was not read; {restore(folder)}."
            )
    return found


def _check_index(folder: Path, weights: Weights) -> None:
    """Refuse files whose tensors differ from their index."""
    # In both directions: a tensor in a file that the index does not name counts too.
    listed = set(_weight_map(folder).items())
    found = {(entry.name, entry.file.name) for entry in weights.entries}
    if differing := sorted(listed ^ found):
        name, file = differing[0]
        problem = (
            f"{folder / INDEX} lists {name} in {file}, but that file does not contain it"
            if (name, file) in listed
            else f"{folder / file} contains {name}, but {INDEX} does not list it there"
        )
        raise UserError(
            f"{problem} ({len(differing)} such tensors), so the files are not from one model; {restore(folder)}."
        )


def weights_sha256(folder: Path) -> str:
    """The hash of a folder's weights: that of the file, or one over the names and hashes of several files.

    Raises:
        UserError: there are no weights.
    """
    paths = weight_files(folder)
    return hash_of_weights(dict(zip((path.name for path in paths), sha256_files(paths), strict=True)))


def require_published(name: str, sha256: str) -> None:
    """Refuse a published model whose weights are not those that download verified.

    Raises:
        UserError: with how to get them.
    """
    if published_sha256(name) != sha256:
        raise UserError(
            f"{MODELS / folder_name(name) / WEIGHTS} is not the file that {MODELS / MANIFEST} names, so its weights cannot be "
            "trusted; "
            f"{how_to_repair(str(MODELS))}."
        )


def published_sha256(name: str) -> str | None:
    """The hash of a published model's weights in download's manifest; None if download has not fetched it."""
    entry = read_json(MODELS / MANIFEST, how_to_repair(str(MODELS))).get(name)
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    return sha256 if isinstance(sha256, str) else None


# ---- Remedies --------------------------------------------------------------------------------------------------------


def restore(folder: Path) -> str:
    """The remedy for a damaged folder: make it again if it is an output of ours, else copy it again."""
    return how_to_repair(str(out)) if (out := _our_out(folder)) else "copy or download it again"


def _our_out(folder: Path) -> Path | None:
    """The pipeline's output folder that a folder is, or is in; None for any other."""
    here = Path(os.path.abspath(folder))
    return next((out for out in (OWN_MODEL, MODELS, CHAT) if here.is_relative_to(os.path.abspath(out))), None)


def require_folder(folder: Path) -> None:
    """Refuse a path that is not a folder.

    Raises:
        UserError: with what may have been meant.
    """
    if not _is_folder(folder):
        raise UserError(f"{folder} is not a folder with a model, so there are no weights to read; {_meant(folder)}.")


def _meant(folder: Path) -> str:
    """The remedy for a path that is not a folder."""
    name, out = str(folder), _our_out(folder)
    published = folder.name if folder.name in PUBLISHED_MODELS else ""
    expanded = os.path.expandvars(os.path.expanduser(name))  # noqa: PTH111 (it keeps the ~ of an unknown user)
    if is_file(folder):
        return f"it is a file: name its folder, {folder.parent}/"
    if expanded != name:
        return f"~ and $NAME are not expanded here: write {expanded}"
    if out == MODELS:
        return f"dvc repro download fetches it where download.models names it: [{published or 'gpt2'}]"
    if out == CHAT:
        return "set finetune.source and run dvc repro, or name another folder"
    if out:
        return "run dvc repro, which makes it, or name another folder"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        fetched = f"run `hf download {name} --local-dir ./{folder.name}` and name ./{folder.name}"
        ours = (
            f"write {published} and add it to download.models, or " if published and folder.parent.name == HUB else ""
        )
        pinned = f"write {name}@COMMIT and add it to download.models, or "
        return f"if it is a model of the Hugging Face hub, {ours or pinned}{fetched}"
    return "name a folder with a model, for example ./gpt2"


NANOGPT = "python docs/how-to/nanogpt_checkpoint.py"
"""The command that converts a nanoGPT checkpoint to a folder; the checkpoint and the folder come after it."""
HUB = "openai-community"
"""The owner of OpenAI's models on the hub."""

_OTHER_FORMATS = {
    "adapter_config.json": f"it holds a LoRA adapter: merge it into its base model first, see {GUIDE}",
    "pytorch_model.bin": "{convert} makes them from pytorch_model.bin",
    "pytorch_model.bin.index.json": "{convert} makes them from pytorch_model-*.bin",
    "model-*.safetensors": "{found} is one of several files, and their index is missing: get model.safetensors.index.json",
    "*.safetensors": "rename {found} to model.safetensors, if that is the model",
    "*.pt": "if {found} is a checkpoint of nanoGPT or build-nanogpt, {nanogpt} converts it to a folder",
    "*.pth": f"{{found}} was written by torch.save: {GUIDE} says how to convert it to a folder",
    "*.bin": f"{{found}} is not a file that transformers writes: {GUIDE} says what can be read",
    "*.gguf": "{found} is llama.cpp's format, which cannot be converted back: get the folder it was made from",
    "flax_model.msgpack": "flax_model.msgpack is Flax's format: get the model's PyTorch weights",
    "tf_model.h5": "tf_model.h5 is TensorFlow's format: get the model's PyTorch weights",
    "*.ckpt.index": "{found} is TensorFlow's format: get the model's PyTorch weights",
    "*.onnx": "{found} is ONNX's format: get the model's PyTorch weights",
    "*/model.safetensors": "name the folder {found}",
    "*/*/model.safetensors": "name the folder {found}",
}
"""The remedy for each pattern of file names that a folder without safetensors may have. The first match wins."""


def _instead(folder: Path) -> str:
    """The remedy for a folder without safetensors, by the files it has."""
    for pattern, remedy in _OTHER_FORMATS.items():
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found:
            what = found.name if "/" not in pattern else found.parent
            name, new = shlex.quote(str(folder)), shlex.quote(f"{folder}-converted")
            nanogpt = f"`{NANOGPT} {shlex.quote(str(found))} {new}`"
            return remedy.format(found=what, convert=f"`{CONVERT} {name}`", nanogpt=nanogpt)
    if out := _our_out(folder):
        return "dvc repro download fetches it" if out == MODELS else "run dvc repro"
    return f"give a Hugging Face folder with safetensors, and see {GUIDE} for other formats"


_MAGIC = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder",
    b"PK\x03\x04": f"was written by torch.save, not by safetensors; {GUIDE} says how to convert it to a folder",
    b"\x80\x02": f"is a pickle, not a safetensors file; {GUIDE} says how to convert it to a folder",
    b"GGUF": "is a GGUF file, not a safetensors file; get the folder it was made from",
    b"\x89HDF": "is a TensorFlow file, not a safetensors file; get the model's PyTorch weights",
    b"<": "is a web page, not the file itself; download the file again",
}


def by_first_bytes(path: Path) -> str:
    """What a file is that is not a safetensors file, and the remedy; empty if its first bytes do not tell."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    if not start:
        return f"is empty, so there is nothing to read; {restore(path.parent)}"
    return next((text for magic, text in _MAGIC.items() if start.startswith(magic)), "")
