"""`pipelib sample`: let a trained model continue a prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelib.cli.command import Command, name_the_option, option
from pipelib.errors import UserError, tell
from pipelib.workspace.places import HERE, ChatPlaces

if TYPE_CHECKING:
    import torch

EXAMPLES = """examples:
  pipelib sample --prompt "Returns the"
  pipelib sample --prompt "Parameters" "See also" --tokens 50 --temperature 0.8 --seed 3
  pipelib sample --chat --prompt "What does numpy.clip do?" --temperature 0
  pipelib sample --prompt "Once upon" --model ../gpt2 --temperature 0    the likeliest text
  pipelib sample --prompt "Once upon" --num-samples 5 --top-p 0.9        five texts, no unlikely words
"""

TOP_K = 50


@dataclass(frozen=True)
class Sample(Command):
    """Let a model continue prompts."""

    command = "sample"
    help = "let a model continue a prompt"
    description = (
        "Print each prompt and its continuation by a model in a Hugging Face folder. A continuation ends where the model ends "
        "the text, or after --tokens tokens. With --chat each prompt is a question, and a fine-tuned model answers it."
    )
    examples = EXAMPLES

    prompt: tuple[str, ...] = option(
        'text to continue; "" lets the model start by itself', nargs="+", action="extend", metavar="TEXT"
    )
    model: Path | None = option("Hugging Face folder; default: models", default=None, metavar="DIR")
    adapter: Path | None = option(
        "LoRA adapter for the model, as PEFT writes it: chat/adapter, for example", default=None, metavar="DIR"
    )
    tokens: int = option("most tokens to write; default: 100", default=100, metavar="N")
    temperature: float = option(
        "0: always the likeliest token; 1: sample as trained; default: 1", default=1.0, metavar="T"
    )
    top_k: int | None = option(
        f"sample from the K likeliest tokens; default: {TOP_K}, or all of them with --top-p", default=None, metavar="K"
    )
    top_p: float | None = option(
        "sample from the likeliest tokens that together have probability P; default: all",
        default=None,
        metavar="P",
    )
    min_p: float | None = option(
        "sample from tokens with at least P times the probability of the likeliest; default: all",
        default=None,
        metavar="P",
    )
    repetition_penalty: float = option(
        "make tokens that are in the text already less likely; 1.1 is mild; default: 1, none", default=1.0, metavar="R"
    )
    stop: tuple[str, ...] | None = option(
        "end a text after one of these", default=None, nargs="+", action="extend", metavar="TEXT"
    )
    chat: bool = option(
        "treat each prompt as a question, and print the answer; default model: chat/model", default=False
    )
    num_samples: int = option("texts per prompt; default: 1", default=1, metavar="N")
    seed: int = option("the same seed gives the same texts; default: 0", default=0, metavar="N")
    device: str | None = option(
        "cpu, cuda, cuda:1, ...; default: the GPU if there is one", default=None, metavar="NAME"
    )

    def run(self) -> int:
        """Print every prompt with its continuations, with a line of dashes between texts.

        Raises:
            UserError: an option would give no text, or the model or the device cannot be used.
        """
        for name, count in (("--tokens", self.tokens), ("--num-samples", self.num_samples)):
            if count < 1:
                raise UserError(f"{name} {count} would write nothing; give 1 or more.")
        if self.stop and "" in self.stop:
            raise UserError("--stop '' is in every text, so each would end at once; give a word or a line end.")
        if self.temperature == 0 and self.num_samples > 1:
            raise UserError(
                f"--temperature 0 would write the same text {self.num_samples} times; drop --num-samples, or sample with "
                "--temperature 1."
            )
        from pipelib.model.adapters import import_adapted
        from pipelib.model.generate import Sampling, at_strings, generate
        from pipelib.vocabulary.chat import USER, ChatTemplate, Message
        from pipelib.vocabulary.choice import chosen_tokenizer, tokenizer_of_model

        top_k = TOP_K if self.top_k is None and self.top_p is None else self.top_k
        sampling = Sampling(self.temperature, top_k, self.top_p, self.min_p, self.repetition_penalty)
        if problem := sampling.problem():
            raise UserError(name_the_option(problem))
        tuned = self.chat and self.adapter is None
        folder = self.model or (ChatPlaces(HERE.chat).model if tuned else HERE.model)
        tokenizer = tokenizer_of_model(folder, chosen_tokenizer())
        model = import_adapted(folder, tokenizer, self.adapter).to(_device(self.device))
        template = ChatTemplate.of(tokenizer)
        if self.chat:
            token_ids = [template.prompt([Message(USER, prompt)]) for prompt in self.prompt]
        else:
            token_ids = [[tokenizer.end_token_id, *tokenizer.encode(prompt)] for prompt in self.prompt]
        context = model.params.context_length
        if (longest := max(map(len, token_ids))) > context:
            tell(
                f"sample: the longest prompt has {longest:,} tokens and the model sees {context:,}, so it continues the end "
                "without the beginning",
                error=True,
            )
        texts = generate(
            model,
            token_ids
            * self.num_samples,  # sample-major, so that a prompt's first text does not depend on how many follow
            self.tokens,
            sampling,
            seed=self.seed,
            stop_token_id=template.stop_token_ids if self.chat else tokenizer.end_token_id,
            ends=at_strings(tokenizer, self.stop) if self.stop else None,
        )
        written = [
            ("" if self.chat else prompt) + tokenizer.decode(new)
            for number, prompt in enumerate(self.prompt)
            for new in texts[number :: len(self.prompt)]
        ]
        print(f"\n{'-' * 80}\n".join(written))
        return 0


def _device(name: str | None) -> "torch.device":
    """The named device; by default the GPU if there is one.

    Raises:
        UserError: the device cannot be used here.
    """
    import torch

    from pipelib.model.device import device_type

    try:
        device = torch.device(name or device_type())
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).splitlines()[0].partition(". ")[0]  # the rest of a long one is for torch's developers
        raise UserError(f"--device {name} cannot be used here ({reason}); use --device cpu.") from None
    return device
