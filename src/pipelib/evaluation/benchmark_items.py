"""Read the items of a four-way benchmark from its file in data/benchmarks."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import UserError, how_to_repair
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import HERE

ENDINGS = 4
REPAIR = how_to_repair(str(HERE.benchmarks))


@dataclass(frozen=True)
class Item:
    """A context and its endings, as token ids."""

    context: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    label: int
    """The index of the right ending."""
    document: int
    """The text it was made from; items of one text are not independent."""
    texts: tuple[str, ...]
    """The context and the endings as text."""

    @property
    def ending_bytes(self) -> list[int]:
        """The bytes of each ending, with the space before it."""
        return [len(f" {ending}".encode("utf-8", "surrogatepass")) for ending in self.texts[1:]]


def holds_items(path: Path) -> bool:
    """Whether a benchmark was downloaded. HellaSwag's file always exists; it has one empty line if it was not asked for."""
    return path.is_file() and path.stat().st_size > 1


def read_items(path: Path, tokenizer: Tokenizer) -> list[Item]:
    """Read the items of a JSON-lines file in HellaSwag's schema.

    Raises:
        UserError: with the line and what is wrong with it.
    """
    items = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                context, endings, label = row["ctx"], row["endings"], int(str(row["label"]))
                if not isinstance(endings, list):
                    raise TypeError("endings is not a list")
                document = row.get("document")
                item = Item(
                    tuple(tokenizer.encode(context)) or (tokenizer.end_token_id,),
                    tuple(tuple(tokenizer.encode(" " + ending)) for ending in endings),
                    label,
                    number if document is None else int(document),
                    (context, *endings),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}, line {number} is not an item ({error!r}); {REPAIR}.") from None
            if len(endings) != ENDINGS or not all(map(str.strip, endings)) or label not in range(ENDINGS):
                raise UserError(
                    f"{path}, line {number} has {len(endings)} endings and the label {label}, but an item needs {ENDINGS} "
                    f"endings that are not empty and a label from 0 to 3; {REPAIR}."
                )
            items.append(item)
    if not items:
        raise UserError(f"{path} has no items, so no accuracy can be measured; {REPAIR}.")
    return items
