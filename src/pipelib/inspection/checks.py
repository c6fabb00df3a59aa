"""Check before the first stage what a later stage would refuse."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipelib.corpus.params import DownloadParams
from pipelib.errors import UserError
from pipelib.finetuning.params import FinetuneParams
from pipelib.inspection.disk import Corpus, check_disk, manifest_of
from pipelib.params import Params
from pipelib.vocabulary.tokenizer import Tokenizer

SLACK = 1.02
"""How much larger than estimated the corpus may be: package versions and whole documents change its size."""


def check_all(file: Path, params: Params, corpus: Corpus | None, ranks: int) -> str:
    """Run all checks that are possible before the first stage, and return the line of `check_disk`.

    Raises:
        UserError: with all problems.
    """
    said: list[str] = []
    # local text may have changed since it was tokenized
    sure = None if params.download.source == "local" else corpus
    require_all([*checks(params, sure, ranks), lambda: said.append(check_disk(file, params, corpus))])
    return said[0]


def require_all(found: Iterable[Callable[[], object]]) -> None:
    """Run the checks, and raise all their problems as one error."""
    problems: list[str] = []
    for check in found:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def checks(params: Params, corpus: Corpus | None, ranks: int) -> Iterator[Callable[[], object]]:
    """The checks for what a later stage would refuse.

    Args:
        corpus: None if its size is unknown.
    """
    from pipelib.corpus.local_files import require_readable
    from pipelib.corpus.published_models import is_model_folder
    from pipelib.evaluation.baselines import require_baseline
    from pipelib.training.batches import check_shares
    from pipelib.training.inputs import require_weights
    from pipelib.vocabulary.choice import chosen_tokenizer
    from pipelib.vocabulary.planned import planned_tokenizer

    path = Path(params.download.path)
    if params.download.source == "local":
        yield partial(_find_text, path, params.download)
    else:  # not read, but DVC hashes it
        yield partial(require_readable, path, links=False)
    if params.finetune.source == "local":
        yield partial(_find_conversations, params.finetune)
    else:
        yield partial(require_readable, Path(params.finetune.path), links=False, section="finetune")
    yield partial(planned_tokenizer, params.vocabulary)
    tokenizer = _tokenizer_of(params)
    if is_model_folder(params.model.init_from) and tokenizer:  # other names are models that download fetches
        yield partial(require_weights, params.model, tokenizer)
    for name in params.evaluate.baselines:
        if is_model_folder(name):
            yield partial(require_baseline, name, tokenizer or chosen_tokenizer())
    yield partial(check_shares, params.train, ranks)
    if corpus is not None and (corpus.is_exact or params.vocabulary.source == "gpt2"):
        yield partial(_check_tokens, params, corpus)


def _tokenizer_of(params: Params) -> Tokenizer | None:
    """Return the tokenizer that the parameters ask for; None if it has yet to be trained, or cannot be read."""
    from pipelib.vocabulary.planned import planned_tokenizer

    with suppress(UserError):
        return planned_tokenizer(params.vocabulary)
    return None


def _find_text(path: Path, params: DownloadParams) -> None:
    """Refuse a folder without text, and a `download.validation` that leaves nothing."""
    from pipelib.corpus.local_files import find_files, validation_names

    files = find_files(path, params.pattern)
    validation_names(files.root, files.names, params.validation)


def _find_conversations(params: FinetuneParams) -> None:
    """Refuse a folder without conversations."""
    from pipelib.finetuning.local import LocalConversations

    assert LocalConversations(params).files


def _check_tokens(params: Params, corpus: Corpus) -> None:
    """Refuse a text that is too short. If the corpus is an estimate, allow `SLACK` more text."""
    from pipelib.training.batches import fit_tokens

    tokens = corpus.tokens if corpus.is_exact else math.ceil(SLACK * corpus.tokens)
    fit_tokens(params.train, manifest_of(replace(corpus, tokens=tokens), params.tokenize.shard_size(tokens)))
