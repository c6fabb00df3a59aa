"""`pipelib sample`: text from a trained model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelib.errors import UserError
from pipelib.workspace.places import HERE

if TYPE_CHECKING:
    import torch

EXAMPLES = """examples:
  pipelib sample --prompt "Returns the"
  pipelib sample --prompt "Parameters" "See also" --tokens 50 --temperature 0.8 --seed 3
  pipelib sample --prompt "Once upon a time" --model ../gpt2 --temperature 0    the likeliest text, always the same
  pipelib sample --prompt "Once upon a time" --num-samples 5 --top-p 0.9        five texts, no unlikely words
"""

TOP_K = 50


def add_parser(subparsers: Any) -> None:
    """Add `sample` to the command."""
    parser = subparsers.add_parser(
        "sample",
        help="let a model go on from a prompt",
        description="Print each prompt and what a model in a Hugging Face folder writes after it, until it ends the text "
        "or has written --tokens tokens.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help='"" lets the model begin by itself'
    )
    parser.add_argument("--model", type=Path, default=HERE.model, metavar="DIR", help="default: models")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to write at most; default: 100")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0 takes the likeliest token each time, 1 draws as trained; default: 1",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"draw among the K likeliest tokens; default: {TOP_K}, or all of them with --top-p",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the fewest likeliest tokens that together have the probability P; default: all",
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same texts; default: 0")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print every prompt with its continuations, a line of dashes between two."""
    for name in ("tokens", "num_samples"):
        if (count := getattr(arguments, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {count} would write nothing; give 1 or more.")
    if arguments.temperature == 0 and arguments.num_samples > 1:
        raise UserError(
            f"--temperature 0 would write the same text {arguments.num_samples} times; drop --num-samples, or draw with "
            "--temperature 1."
        )
    from pipelib.model.generate import generate
    from pipelib.model.huggingface import import_model
    from pipelib.vocabulary.choice import chosen_tokenizer

    tokenizer = chosen_tokenizer()
    model = import_model(arguments.model, tokenizer).to(_device(arguments.device))
    top_k = TOP_K if arguments.top_k is None and arguments.top_p is None else arguments.top_k
    token_ids = [[tokenizer.end_token_id, *tokenizer.encode(prompt)] for prompt in arguments.prompt]
    texts = generate(
        model,
        token_ids * arguments.num_samples,  # a prompt's first text is the same however many follow
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_token_id=tokenizer.end_token_id,
    )
    written = [
        prompt + tokenizer.decode(new)
        for number, prompt in enumerate(arguments.prompt)
        for new in texts[number :: len(arguments.prompt)]
    ]
    print(f"\n{'-' * 80}\n".join(written))
    return 0


def _device(name: str | None) -> "torch.device":
    """The named device, or the best there is.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # what torch raises depends on how it was built
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); use --device cpu.") from None
    return device
