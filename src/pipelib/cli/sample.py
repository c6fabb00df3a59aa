"""`pipelib sample`: text from a trained model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelib.errors import UserError

if TYPE_CHECKING:
    import torch

EXAMPLES = """examples:
  pipelib sample --prompt "Returns the"
  pipelib sample --prompt "Parameters" "See also" --tokens 50 --temperature 0.8 --seed 3
  pipelib sample --prompt "Once upon a time" --model ../gpt2 --temperature 0    the likeliest text, always the same
"""


def add_parser(subparsers: Any) -> None:
    """Add `sample` to the command."""
    parser = subparsers.add_parser(
        "sample",
        help="let a model go on from a prompt",
        description="Print each prompt and what a GPT-2 in a Hugging Face folder writes after it, until it ends the text "
        "or has written --tokens tokens.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help='"" lets the model begin by itself'
    )
    parser.add_argument("--model", type=Path, default=Path("models"), metavar="DIR", help="default: models")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens to write at most; default: 100")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0 takes the likeliest token each time, 1 draws as trained; default: 1",
    )
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="draw among the K likeliest tokens; default: 50"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text; default: 0")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print every prompt with its continuation, a line of dashes between two."""
    if arguments.tokens < 1:
        raise UserError(f"--tokens {arguments.tokens} would write nothing; give 1 or more.")
    from pipelib.model.generate import generate
    from pipelib.model.huggingface import import_model
    from pipelib.model.vocabulary import EOT_TOKEN_ID
    from pipelib.tokens.encoding import tiktoken_encoding

    model = import_model(arguments.model).to(_device(arguments.device))
    encoding = tiktoken_encoding()
    for number, prompt in enumerate(arguments.prompt):
        token_ids = generate(
            model,
            [EOT_TOKEN_ID, *encoding.encode_ordinary(prompt)],
            arguments.tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed + number,
            stop_token_id=EOT_TOKEN_ID,
        )
        if number:
            print("-" * 80)
        print(prompt + encoding.decode(token_ids), flush=True)
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
