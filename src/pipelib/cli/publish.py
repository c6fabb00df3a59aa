"""`pipelib publish`: the model and its card as a repository of the Hugging Face hub."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelib.cli.command import Command, option

EXAMPLES = """examples:
  HF_TOKEN=... pipelib publish --repo NAME/gpt2-124m-fineweb-edu --private
  pipelib publish --repo NAME/gpt2-124m-fineweb-edu --licence mit
  pipelib publish --repo NAME/gpt2-124m-fineweb-edu --out ../look    write it, and send nothing
"""


@dataclass(frozen=True)
class Publish(Command):
    """Put the model on the hub."""

    command = "publish"
    help = "put the model and its card on the Hugging Face hub"
    description = (
        "Join models/ with reports/model_card.md in a copy, add the git commit, and upload it with the token of HF_TOKEN or `hf "
        "auth login`. Refuses where the model, the card and dvc.lock do not belong together, or something is not committed."
    )
    examples = EXAMPLES

    repo: str = option("OWNER/MODEL; made where it does not exist", metavar="NAME")
    private: bool = option("make it a private repository", default=False)
    licence: str | None = option(
        "the model's licence, for example mit; without it the card names none", default=None, metavar="ID"
    )
    out: Path | None = option("write what would be uploaded into DIR, and upload nothing", default=None, metavar="DIR")

    def run(self) -> int:
        """Check, copy, upload.

        Raises:
            UserError: the model or card is missing or of another run, something is not committed, or the hub refuses.
        """
        from pipelib.inspection.out_folder import make_out
        from pipelib.inspection.publish import find_token, require_whole, upload, write_copy

        token = "" if self.out else find_token()
        require_whole()
        if self.out is not None:
            make_out(self.out, empty=True)
            write_copy(self.out, self.repo, self.licence)
            print(f"{self.out} has what would be uploaded to {self.repo}")
            return 0
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=".") as folder:
            write_copy(Path(folder), self.repo, self.licence)
            url = upload(Path(folder), self.repo, token, private=self.private)
        print(f"{self.repo} is at {url}")
        return 0
