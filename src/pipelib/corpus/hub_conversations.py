"""Conversations from the Hugging Face hub, for fine-tuning: the files of one folder of a dataset, unchanged.

They are listed at a pinned commit, verified and stored as those of a corpus are. `finetuning/formats.py` says what a row may be.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelib.corpus.hub_lists import HubFile, list_files
from pipelib.corpus.hub_store import HubStore, open_store
from pipelib.corpus.hub_transfer import DEFAULT_RETRY, HubRepo, Retry
from pipelib.corpus.params import CONVERSATION_KINDS, HubConversationsParams
from pipelib.files import link_or_copy, sha256_file, write_json
from pipelib.workspace.places import MANIFEST


def _repo(params: HubConversationsParams) -> HubRepo:
    return HubRepo(params.repo, params.revision, section="download.conversations")


def conversation_files(params: HubConversationsParams, retry: Retry = DEFAULT_RETRY) -> list[HubFile]:
    """List the files of the folder. The hub is asked once; its answer is stored.

    Raises:
        UserError: the hub refuses, is unreachable, or has no such revision or folder; or no file can be read.
    """
    return list_files(_repo(params), params.folder, CONVERSATION_KINDS, retry)


def write_conversations(params: HubConversationsParams | None, folder: Path, retry: Retry = DEFAULT_RETRY) -> None:
    """Put the files that `download.conversations` names into `folder`, with a manifest; an empty manifest if it is null.

    Raises:
        UserError: a file cannot be downloaded, or the disk is too small.
    """
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {}
    if params:
        files = conversation_files(params, retry)
        with _open(params, retry) as store:
            for file, path in zip(files, store.fetch(files), strict=True):
                name = quote(
                    file.path.removeprefix(f"{params.folder.strip('/')}/"), safe=""
                )  # subfolders may have equal names
                link_or_copy(path, folder / name)
                manifest[name] = {"path": file.path, "bytes": path.stat().st_size, "sha256": sha256_file(folder / name)}
        manifest = {"repo": params.repo, "revision": params.revision, "files": manifest}
    write_json(folder / MANIFEST, manifest)


@contextmanager
def _open(params: HubConversationsParams, retry: Retry) -> Iterator[HubStore]:
    with open_store(_repo(params), retry) as store:
        yield store
