"""Publish the model and its card on the Hugging Face hub: check that they belong together, copy both, upload."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipelib.corpus.hub_client import client, endpoint, headers, permanent_failure, session, shown
from pipelib.errors import UserError
from pipelib.evaluation.model_card import CHAT_FROM, LOAD_FROM, REPRODUCE
from pipelib.files import files_under, link_or_copy, write_text
from pipelib.inspection.verify import check_folder, find_folders
from pipelib.tracking.record import redact
from pipelib.workspace.dvc import read_lock
from pipelib.workspace.git import git_state, run_git
from pipelib.workspace.places import HERE, ChatPlaces


@dataclass(frozen=True)
class Published:
    """What is published: a model, and its card."""

    stage: str
    """The stage that makes the model."""
    out: Path
    """Its out."""
    model: Path
    """The model's folder: the out, or in it."""
    card: Path
    load_from: str
    """How the card names the model; the repository's name replaces it."""


MODEL = Published("train", HERE.model, HERE.model, HERE.model_card, LOAD_FROM)
CHAT = Published("finetune", HERE.chat, ChatPlaces(HERE.chat).model, HERE.chat_card, CHAT_FROM)


def require_whole(what: Published) -> None:
    """Check that the model is the one in dvc.lock, that the card describes it, and that everything is committed.

    Raises:
        UserError: one of these is not so.
    """
    remedy = "set finetune.source and run dvc repro" if what is CHAT else "run dvc repro"
    for path, name in ((what.model / "model.safetensors", "no model"), (what.card, "no model card")):
        if not path.is_file():
            raise UserError(f"{path} does not exist, so there is {name} to publish; {remedy}.")
    # models/ and reports/ are intact
    for folder in (what.out, what.card.parent):
        ((_, out),) = find_folders(folder).items()
        if problems := check_folder(folder, out).problems:
            raise UserError(
                f"{folder} is not what dvc.lock says, so its card would be wrong; run dvc repro, or dvc checkout {folder}.\n"
                + "\n".join(problem.text for problem in problems)
            )
    # the report was made from this very model
    stages = read_lock()
    made = [out.md5 for out in stages[what.stage].outs if out.path == str(what.out)] if what.stage in stages else []
    read = [dep.md5 for dep in stages["evaluate"].deps if dep.path == str(what.out)] if "evaluate" in stages else []
    if not made or read != made:
        raise UserError(
            f"reports/ describes another model than {what.out}/, so the card would be wrong; run dvc repro evaluate."
        )
    # the commit has everything that made the model
    changes = run_git(Path.cwd(), "status", "--porcelain")
    if not git_state(Path.cwd())["commit"]:
        raise UserError(
            "git has no commit of this folder, so the card could not name the code of the model; publish from the clone that "
            "made the model, or commit everything here."
        )
    if changes:
        raise UserError(
            "the working tree has changes that are not committed, so this model could not be reproduced; commit them, dvc.lock "
            "and metrics/ too (`git status` lists them)."
        )


def write_copy(what: Published, folder: Path, repo: str, licence: str | None) -> None:
    """Write the files for the hub: those of the model, the pictures, and the card as README.md with the git commit.

    Raises:
        UserError: `repo` or `licence` has characters that would break the card.
    """
    for option, value in (("--repo", repo), ("--licence", licence or "")):
        if not value.isprintable():
            raise UserError(f"{option} {value!r} has characters that would break the card; write it without them.")
    for path in files_under(what.model):
        if path.name != "README.md":
            link_or_copy(path, folder / path.relative_to(what.model))
    card = what.card.read_text(encoding="utf-8").replace(what.load_from, f'"{repo}"')
    for picture in sorted(what.card.parent.glob("*.png")):
        if f"({picture.name})" in card:
            link_or_copy(picture, folder / picture.name)
    commit = git_state(Path.cwd())["commit"]
    card = card.replace(REPRODUCE, f"{REPRODUCE}\n\nGit commit `{commit}` of the pipeline's repository has all of it.")
    if licence:
        card = card.replace("---\n", f"---\nlicense: {licence}\n", 1)
    write_text(folder / "README.md", redact(card))


def find_token() -> str:
    """The user's access token for the hub.

    Raises:
        UserError: there is no token, or HF_HUB_OFFLINE is set.
    """
    hub = client()
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or write the files with --out DIR."
        )
    headers()  # raises for a token that cannot be read or sent
    token = hub.get_token()
    if not token:
        raise UserError(
            "there is no token, so the hub would refuse the upload; create one with write access at "
            "https://huggingface.co/settings/tokens and set HF_TOKEN, or run `hf auth login`."
        )
    return str(token)


def upload(folder: Path, repo: str, token: str, *, private: bool) -> str:
    """Upload a folder as one commit, and return the URL of the repository.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    endpoint(), session()  # raise for environment variables that cannot work
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Publish with pipelib")
    except HFValidationError as error:
        raise UserError(f"--repo {repo} is not a name that the hub accepts ({error}); write OWNER/MODEL.") from None
    except HfHubHTTPError as error:
        said = redact(str(error).replace(token, "***")).strip().splitlines()
        raise UserError(
            f"the hub refused {repo} ({said[0] if said else type(error).__name__}), so it is not published; check that the "
            "token has write access and that OWNER is you or your organisation, then run the command again."
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the client's error for a large file that failed
        if flaw := permanent_failure(error):
            raise UserError(f"{repo} is not published ({flaw[0]}): {flaw[1]}.") from None
        said = redact(str(error).replace(token, "***")).strip().splitlines()
        raise UserError(
            f"the hub cannot be reached ({said[0] if said else type(error).__name__}), so {repo} is not published; check the "
            "connection and HF_ENDPOINT, then run the command again."
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):  # the client's errors for an unexpected answer
        raise UserError(
            f"{shown(endpoint())} does not answer as the hub does, so {repo} is not published; check HF_ENDPOINT and the "
            "network (a proxy, or a page that wants a login first), then run the command again."
        ) from None
    return str(url)
