"""`pipelib publish`: upload the model and its card to the Hugging Face hub."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelib.cli.command import Command, option

EXAMPLES = """examples:
  HF_TOKEN=... pipelib publish --repo NAME/gpt2-124m-fineweb-edu --private
  pipelib publish --repo NAME/gpt2-124m-fineweb-edu --licence mit
  pipelib publish --repo NAME/gpt2-124m-fineweb-edu --out ../look    write the files, upload nothing
"""


@dataclass(frozen=True)
class Publish(Command):
    """Upload the model to the hub."""

    command = "publish"
    help = "upload the model and its card to the Hugging Face hub"
    description = (
        "Copy models/ and reports/model_card.md (with --chat: chat/model and reports/chat_card.md) into one folder, add the git "
        "commit to the card, and upload the folder with the token from HF_TOKEN or `hf auth login`. Nothing is uploaded if the "
        "model, the card and dvc.lock do not belong together, or if something is not committed."
    )
    examples = EXAMPLES

    repo: str = option("repository on the hub, OWNER/MODEL; created if it does not exist", metavar="NAME")
    chat: bool = option("publish chat/model, the fine-tuned model, with its card", default=False)
    private: bool = option("create a private repository", default=False)
    licence: str | None = option(
        "licence of the model, for example mit; default: the card names none", default=None, metavar="ID"
    )
    out: Path | None = option("write the files to DIR, and upload nothing", default=None, metavar="DIR")

    def run(self) -> int:
        """Check, copy, upload.

        Raises:
            UserError: the model or card is missing or from another run, something is not committed, or the hub refuses.
        """
        from pipelib.inspection.out_folder import make_out
        from pipelib.inspection.publish import CHAT, MODEL, find_token, require_whole, upload, write_copy

        token = "" if self.out else find_token()  # fail before the files are read
        what = CHAT if self.chat else MODEL
        require_whole(what)
        if self.out is not None:
            make_out(self.out, empty=True)
            write_copy(what, self.out, self.repo, self.licence)
            print(f"{self.out} has the files that would be uploaded to {self.repo}")
            return 0
        # in the workspace, so that the copy can be made of hard links
        with tempfile.TemporaryDirectory(prefix=".publish-", dir=".") as folder:
            write_copy(what, Path(folder), self.repo, self.licence)
            url = upload(Path(folder), self.repo, token, private=self.private)
        print(f"{self.repo} is at {url}")
        return 0
