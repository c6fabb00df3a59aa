"""A dialogue with a model: what was said, and the next answer while it is written."""

import codecs
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from pipelib.errors import UserError
from pipelib.files import write_text
from pipelib.model.decoder import Decoder
from pipelib.model.generate import Sampling, stream
from pipelib.vocabulary.chat import ASSISTANT, SYSTEM, USER, ChatTemplate, Message
from pipelib.vocabulary.tokenizer import Tokenizer


@dataclass
class Dialogue:
    """Turns of a user and a model. A base model, which knows no turns, continues each text by itself."""

    model: Decoder
    tokenizer: Tokenizer
    knows_turns: bool
    """Whether the model was fine-tuned on conversations."""
    tokens: int
    """The most tokens of an answer."""
    sampling: Sampling
    seed: int
    """Of the first answer; each further one has the next seed."""
    messages: list[Message] = field(default_factory=list)
    """What was said so far, a system message first if there is one."""
    dropped: int = 0
    """Messages that the model no longer sees, since its context is full."""

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the answer in pieces. If the iteration ends early, what was written so far is kept as the answer."""
        self.messages.append(Message(USER, text))
        prompt, written = self._prompt(text), ""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may be a part of a character
        try:
            for _, token in stream(
                self.model,
                [prompt],
                self.tokens,
                self.sampling,
                seed=self.seed,
                stop_token_id=ChatTemplate.of(self.tokenizer).stop_token_ids,
            ):
                piece = decoder.decode(self.tokenizer.decode_bytes([token]))
                written += piece
                yield piece
            piece = decoder.decode(b"", final=True)
            written += piece
            yield piece
        finally:
            self.messages.append(Message(ASSISTANT, written))
            self.seed += 1

    def _prompt(self, text: str) -> list[int]:
        """The tokens that the model continues. The oldest exchanges are left out where the context is full."""
        if not self.knows_turns:
            return [self.tokenizer.end_token_id, *self.tokenizer.encode(text)]
        template = ChatTemplate.of(self.tokenizer)
        system, turns = [m for m in self.messages if m.role == SYSTEM], [m for m in self.messages if m.role != SYSTEM]
        first = 0
        while True:
            prompt = template.prompt([*system, *turns[first:]])
            if len(prompt) + self.tokens <= self.model.params.context_length or first + 2 > len(turns) - 1:
                break
            first += 2
        self.dropped = first
        return prompt

    def reset(self, system: str = "") -> None:
        """Forget what was said.

        Args:
            system: the new system message; empty for none.
        """
        self.messages, self.dropped = ([Message(SYSTEM, system)] if system else []), 0

    def save(self, path: Path) -> None:
        """Append the dialogue to a file of conversations, in the format that `finetune.source: local` reads.

        Raises:
            UserError: the file cannot be written.
        """
        row = {"messages": [{"role": message.role, "content": message.content} for message in self.messages]}
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            write_text(path, before + json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error}); name another file.") from None
