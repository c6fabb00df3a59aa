"""A vocabulary small enough for a test: with GPT-2's, nearly all of a small model's time and memory would be its 50,257 tokens.

Tests about GPT-2's vocabulary use that one.
"""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from small_corpus import make_texts

from pipelib.vocabulary.bpe import train_bpe
from pipelib.vocabulary.chat import START, STOP
from pipelib.vocabulary.choice import Vocabulary, write_vocabulary
from pipelib.vocabulary.engines import HARD_STRINGS
from pipelib.vocabulary.folder import read_tokenizer
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.tokenizer import Tokenizer

SIZE = 500
"""Its tokens: not a multiple of 128, so that the embedding has rows of padding."""


def train_tokenizer(folder: Path, pre_tokenizer: Any = "gpt2") -> Tokenizer:
    """Train a vocabulary with the tokens of the chat template: always the same one for a rule to split text."""
    params = VocabularyParams("train", SIZE, pre_tokenizer, (START, STOP), 10**6, "auto")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(train_bpe([*make_texts(400, words=60), *HARD_STRINGS * 3], params))
    return read_tokenizer(folder)


FOLDER = Path(tempfile.mkdtemp(prefix="small-vocabulary"))
"""The files of `TOKENIZER`, for other processes."""
atexit.register(shutil.rmtree, FOLDER)
TOKENIZER = train_tokenizer(FOLDER)


def write_small_vocabulary(folder: Path) -> None:
    """Write `TOKENIZER` as data/vocabulary has it."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    write_vocabulary(folder, Vocabulary(TOKENIZER, None))
