"""A bag of words: a position knows which tokens came before it, and not in which order."""

import torch
from pipelib.model.shapes.toy import ToyParams
from torch import Tensor, nn

from pipelib.model.attend import Attend, causal
from pipelib.model.decoder import Decoder
from pipelib.vocabulary.tokenizer import padded_size


class BagOfWords(Decoder):
    architecture = "toy"
    embedding_names = ("words.weight",)

    def __init__(self, params: ToyParams, vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        self.words = nn.Embedding(padded_size(vocab_size), params.width)
        self.mix = nn.Linear(params.width, params.width, bias=False)

    def hidden(self, inputs: Tensor, positions: Tensor | None = None, attend: Attend = causal) -> Tensor:  # noqa: ARG002
        words = self.words(inputs)[:, None]  # one head: (B, 1, T, C)
        alike = torch.zeros_like(words)  # no token is looked at more than another
        return self.run(self.mix, words[:, 0] + attend(0, alike, alike, words)[:, 0])

    @property
    def head(self) -> Tensor:
        return self.words.weight


DECODER = BagOfWords
