"""The chat template: a conversation as tokens, which of them are answers, and the same rule in Jinja for other programs.

With the special tokens `<|im_start|>` and `<|im_end|>` it is ChatML:

    <|im_start|>user
    What does numpy.clip do?<|im_end|>
    <|im_start|>assistant
    Limit the values in an array.<|im_end|>

A vocabulary without them (GPT-2's) writes roles as ordinary text, and ends each turn with its end token:

    User:
    What does numpy.clip do?<|endoftext|>Assistant:
    Limit the values in an array.<|endoftext|>

White space around a content is removed: it would join the line end before it, and the tokens of a conversation would not be those
of its parts. A content is always ordinary text, also where it spells a special token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipelib.vocabulary.tokenizer import Tokenizer

START, STOP = "<|im_start|>", "<|im_end|>"
"""The special tokens around a turn."""
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str


@dataclass(frozen=True)
class Turn:
    """A turn as tokens."""

    role: str
    token_ids: list[int]
    content: slice
    """The content and the token that ends the turn, in `token_ids`: what a model has to write, if it is the assistant's."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a vocabulary writes conversations."""

    tokenizer: Tokenizer
    start: str
    """The special token before a turn; empty if there is none."""
    stop: str
    """The special token that ends a turn, and that ends an answer."""
    names: tuple[str, str, str]
    """How `ROLES` are written."""
    after: str
    """Ordinary text after a turn."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a vocabulary."""
        if {START, STOP} <= tokenizer.special_tokens.keys():
            return cls(tokenizer, START, STOP, ROLES, "\n")
        end = next(text for text, number in tokenizer.special_tokens.items() if number == tokenizer.end_token_id)
        return cls(tokenizer, "", end, ("System:", "User:", "Assistant:"), "")

    @property
    def stop_token_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.special_tokens[self.stop]

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens at which a model stops: that one, and the one that ends a text."""
        return list(dict.fromkeys((self.stop_token_id, self.tokenizer.end_token_id)))

    @property
    def marker_token_ids(self) -> list[int]:
        """The special tokens that the template writes."""
        return sorted({self.tokenizer.special_tokens[token] for token in (self.start, self.stop) if token})

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Encode a conversation, turn by turn: its tokens are theirs, one after the other."""
        return [self._turn(message) for message in messages]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to where the assistant begins to answer."""
        return [token for turn in self.turns(messages) for token in turn.token_ids] + self._heads[ASSISTANT]

    def _turn(self, message: Message) -> Turn:
        head, content = self._heads[message.role], self._content(message.content.strip())
        until_stop = [*head, *content, self.stop_token_id]
        return Turn(message.role, [*until_stop, *self._tail], slice(len(head), len(until_stop)))

    def _content(self, text: str) -> list[int]:
        """Encode a content as ordinary text. Where it spells a special token, the spelling is encoded by itself, as
        transformers does with `sanitize_control_tokens`.
        """
        return [token for piece in self._spellings.split(text) for token in self.tokenizer.encode(piece)]

    @cached_property
    def _spellings(self) -> re.Pattern[str]:
        longest_first = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def _heads(self) -> dict[str, list[int]]:
        """What is before the content, by role."""
        special = [self.tokenizer.special_tokens[self.start]] if self.start else []
        return {
            role: [*special, *self.tokenizer.encode(f"{name}\n")] for role, name in zip(ROLES, self.names, strict=True)
        }

    @cached_property
    def _tail(self) -> list[int]:
        return self.tokenizer.encode(self.after)

    def spells_marker(self, content: str) -> bool:
        """Whether a content has the spelling of a special token. Other programs may take it for the token itself."""
        return self._spellings.search(content) is not None

    @property
    def jinja(self) -> str:
        """The template in the language of `chat_template` in Hugging Face's folders."""
        names = ", ".join(f"'{role}': '{name}'" for role, name in zip(ROLES, self.names, strict=True))
        head = "{{ '" + self.start + "' + names[message['role']] + '\\n' }}"
        body = "{{ message['content'] | trim }}{{ '" + self.stop + "' }}"
        after = "{{ '\\n' }}" if self.after else ""
        return (
            "{% set names = {" + names + "} %}{% for message in messages %}" + head
            + "{% if message['role'] == 'assistant' %}{% generation %}" + body + "{% endgeneration %}"
            + "{% else %}" + body + "{% endif %}" + after + "{% endfor %}"
            + "{% if add_generation_prompt %}{{ '" + self.start + "' + names['assistant'] + '\\n' }}{% endif %}"
        )  # fmt: skip


def order_problem(messages: Sequence[Message]) -> str:
    """What keeps a model from learning from these messages; empty if nothing does."""
    turns = [message.role for message in messages if message.role != SYSTEM]
    if SYSTEM in [message.role for message in messages[1:]]:
        return "a system message is not the first one, so it is unclear what it refers to"
    if not turns:
        return "there is no turn of a user or an assistant"
    if turns[0] != USER:
        return f"the first turn is of the role {turns[0]}, not of a user"
    if twice := next((number for number in range(1, len(turns)) if turns[number] == turns[number - 1]), 0):
        return f"turns {twice} and {twice + 1} are both of the role {turns[twice]}, so roles do not alternate"
    return "" if turns[-1] == ASSISTANT else "the last turn is the user's, so there is no answer to learn from"
