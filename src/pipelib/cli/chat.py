"""`pipelib chat`: talk to a model in the terminal."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelib.cli.command import Command, name_the_option, option
from pipelib.errors import UserError, tell
from pipelib.workspace.places import HERE

if TYPE_CHECKING:
    from pipelib.model.dialogue import Dialogue

EXAMPLES = """examples:
  pipelib chat                                      chat/model, or models/ if nothing was fine-tuned
  pipelib chat --model ../other-clone/chat/model --temperature 0
  pipelib chat --run HEAD~1                         the model of another commit, or of an experiment
  echo "What does numpy.clip do?" | pipelib chat    a question a line, an answer a line or more

in a terminal:
  /reset            forget what was said
  /system TEXT      forget it, and begin with a system message
  /temperature T    0: always the likeliest token
  /seed N           the same seed gives the same answer
  /save FILE        append the dialogue to a file of conversations (jsonl) that finetune reads
  /quit             or Ctrl-D; Ctrl-C stops an answer
"""


@dataclass(frozen=True)
class Chat(Command):
    """Talk to a model."""

    command = "chat"
    help = "talk to a model"
    description = (
        "Answer what is typed, token by token, with all that was said before. A model that was not fine-tuned on conversations "
        "continues each text instead. In a pipe each line is a question."
    )
    examples = EXAMPLES

    model: Path | None = option(
        "Hugging Face folder; default: chat/model if it is there, else models", default=None, metavar="DIR"
    )
    run_: str | None = option(
        "the model of a run instead: workspace, the folder of a checkout, a git revision, or a DVC experiment; read "
        "from DVC's cache, so the workspace does not change",
        default=None,
        metavar="NAME",
    )
    adapter: Path | None = option(
        "LoRA adapter for the model, as PEFT writes it: chat/adapter, for example; the default model is then models",
        default=None,
        metavar="DIR",
    )
    system: str = option("a system message to begin with", default="", metavar="TEXT")
    tokens: int = option("most tokens of an answer; default: 128", default=128, metavar="N")
    temperature: float = option("0: always the likeliest token; default: 0.7", default=0.7, metavar="T")
    top_k: int = option("sample from the K likeliest tokens; default: 50", default=50, metavar="K")
    repetition_penalty: float = option(
        "make tokens that are in the text already less likely; default: 1, none", default=1.0, metavar="R"
    )
    seed: int = option("the same seed gives the same answers; default: 0", default=0, metavar="N")

    def run(self) -> int:
        """Answer until the input ends.

        Raises:
            UserError: the model cannot be read, or an option is not possible.
        """
        with self._folder() as folder:
            return self._talk(self._begin(folder))

    def _talk(self, dialogue: "Dialogue") -> int:
        in_terminal = sys.stdin.isatty()
        if in_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  (the arrow keys then work in `input`)
            what = "answers" if dialogue.knows_turns else "was not fine-tuned: it continues what you type"
            print(f"{dialogue.model.params.title}, {what}. /help lists commands, Ctrl-D ends.")
        while True:
            try:
                line = input("> " if in_terminal else "")
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print("\nCtrl-D or /quit ends.")
                continue
            if in_terminal and line.startswith("/"):
                if line.split()[0] in ("/quit", "/exit"):
                    return 0
                self._obey(dialogue, line)
            elif line.strip():
                self._answer(dialogue, line)

    def _folder(self) -> AbstractContextManager[Path]:
        from pipelib.inspection.run_model import model_of_run, workspace_model

        if self.run_ is not None and self.model is not None:
            raise UserError("--model and --run both name a model, so it is unclear which is meant; give one of them.")
        if self.run_ is not None:
            return model_of_run(self.run_)
        return nullcontext(self.model or (workspace_model() if self.adapter is None else HERE.model))

    def _begin(self, folder: Path) -> "Dialogue":
        from pipelib.model.adapters import import_adapted
        from pipelib.model.device import pick_device
        from pipelib.model.dialogue import Dialogue
        from pipelib.model.generate import Sampling
        from pipelib.model.huggingface import read_chat_template
        from pipelib.vocabulary.choice import chosen_tokenizer, tokenizer_of_model

        if self.tokens < 1:
            raise UserError(f"--tokens {self.tokens} would answer nothing; give 1 or more.")
        tokenizer = tokenizer_of_model(folder, chosen_tokenizer())
        model = import_adapted(folder, tokenizer, self.adapter).to(pick_device())
        sampling = Sampling(self.temperature, self.top_k, repetition_penalty=self.repetition_penalty)
        if problem := sampling.problem():
            raise UserError(name_the_option(problem))
        dialogue = Dialogue(
            model, tokenizer, bool(read_chat_template(self.adapter or folder)), self.tokens, sampling, self.seed
        )
        dialogue.reset(self.system)
        return dialogue

    def _answer(self, dialogue: "Dialogue", text: str) -> None:
        """Print the answer as it is written. Ctrl-C ends it."""
        before, pieces = dialogue.dropped, dialogue.answer(text)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
        finally:
            pieces.close()  # it notes what was written so far
        print()
        if dialogue.dropped > before:
            tell(f"chat: the context is full, so the first {dialogue.dropped} messages are no longer seen", error=True)

    def _obey(self, dialogue: "Dialogue", line: str) -> None:
        """Follow a command such as `/seed 3`."""
        word, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], object]] = {
            "help": lambda _: print(EXAMPLES[EXAMPLES.index("in a terminal:") :], end=""),
            "reset": lambda _: dialogue.reset(),
            "system": dialogue.reset,
            "temperature": lambda value: self._change(dialogue, float(value)),
            "seed": lambda value: setattr(dialogue, "seed", int(value)),
            "save": lambda name: dialogue.save(Path(name).expanduser()),
        }
        try:
            if word not in commands:
                raise UserError(f"/{word} is not a command; /help lists them.")
            if word == "save" and not rest.strip():
                raise UserError("/save needs the name of a file.")
            commands[word](rest.strip())
        except UserError as error:
            print(error)
        except ValueError:
            print(f"/{word} {rest} has no number; for example /{word} {'0.7' if word == 'temperature' else '3'}.")

    @staticmethod
    def _change(dialogue: "Dialogue", temperature: float) -> None:
        sampling = replace(dialogue.sampling, temperature=temperature)
        if problem := sampling.problem():
            raise UserError(problem)
        dialogue.sampling = sampling
