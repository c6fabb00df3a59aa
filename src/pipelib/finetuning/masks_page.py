"""A page that shows which tokens of conversations are trained: the surest way to find a wrong mask is to look."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from pipelib.finetuning.dataset import Dataset
from pipelib.vocabulary.tokenizer import Tokenizer

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark; }
article { border: 1px solid #8886; border-radius: 6px; padding: 0.7rem 1rem; margin: 1rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace; }
h2 { font-size: 0.9rem; margin: 1.5rem 0 0; font-weight: 600; }
mark { background: #2a9d5555; color: inherit; border-radius: 3px; }
"""


def masks_page(dataset: Dataset, numbers: Sequence[int], tokenizer: Tokenizer) -> str:
    """Write the page.

    Args:
        numbers: the conversations to show.
    """
    parts = [_conversation(dataset, number, tokenizer) for number in numbers]
    share = dataset.trained.mean()
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>What is trained</title><style>{_STYLE}</style>\n<h1>What is trained</h1>\n"
        f"<p>The model learns to write the <mark>coloured</mark> tokens, {share:.0%} of all; it only reads the others. "
        f"{len(numbers)} of {len(dataset):,} conversations, spread over the dataset.</p>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _conversation(dataset: Dataset, number: int, tokenizer: Tokenizer) -> str:
    pairs = zip(dataset.tokens(number).tolist(), dataset.mask(number).tolist(), strict=True)
    text = ""
    for trained, run in groupby(pairs, key=lambda pair: pair[1]):
        words = escape(tokenizer.decode([token for token, _ in run]))
        text += f"<mark>{words}</mark>" if trained else words
    split = "held out" if dataset.held_out[number] else "trained on"
    return f"<h2>Conversation {number:,}, {split}</h2>\n<article>{text}</article>"
