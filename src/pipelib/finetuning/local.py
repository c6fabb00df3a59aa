"""Conversations in files: parquet, jsonl, JSON or csv, also compressed, or datasets that were saved to disk."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelib.corpus.local_files import LocalFiles, find_files
from pipelib.corpus.local_rows import BadRowError, Tally
from pipelib.corpus.params import kind_of_name
from pipelib.errors import UserError, how_to_repair, tell
from pipelib.files import read_json, sha256_file, sha256_files
from pipelib.finetuning.formats import conversation_of
from pipelib.finetuning.params import FinetuneParams
from pipelib.vocabulary.chat import Message
from pipelib.workspace.places import HERE, MANIFEST


@dataclass(frozen=True)
class FileConversations(ABC):
    """The conversations in the rows of some files."""

    params: FinetuneParams
    tally: Tally = field(
        default_factory=lambda: Tally(source="finetune", remedy="fix the files, or set finetune.format"), compare=False
    )
    """What was left out, once all rows are read."""

    @property
    @abstractmethod
    def files(self) -> LocalFiles:
        """The files that are read, in order."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that pins the files."""

    @property
    def bad_rows(self) -> Counter[str]:
        """Rows that were left out, by reason, once all are read."""
        return self.tally.bad

    def read(self) -> Iterator[tuple[str, list[Message]]]:
        """Yield each conversation with its file and row.

        Raises:
            UserError: a row is not a conversation.
        """
        from pipelib.corpus.local_formats import Reading, read_rows  # not needed to link finished outs
        from pipelib.corpus.split import Cut
        from pipelib.corpus.text_files import Decoding

        reading = Reading(None, Decoding("utf-8", "refuse", section=""), Cut("whole", ""))
        for name in self.files.names:
            for number, row in read_rows(self.files.root / name, name, reading):
                self.tally.rows += 1
                where = f"{name}, row {number}"
                try:
                    if isinstance(row, BadRowError):
                        raise row
                    yield where, conversation_of(row, self.params.format, where)
                except BadRowError as error:
                    if self.params.bad_rows == "refuse":
                        raise UserError(
                            f"{error.problem}; fix this row, skip it with finetune.bad_rows: skip, or leave out its file with "
                            "finetune.pattern."
                        ) from None
                    self.tally.skip(error)

    def finish(self) -> None:
        """Print what was left out.

        Raises:
            UserError: too many rows are not conversations.
        """
        self.tally.require_few_bad()
        for reason, count in self.tally.bad.most_common():
            tell(f"finetune: bad rows are left out ({reason}): {count:,}; the first is {self.tally.first[reason]}")


@dataclass(frozen=True)
class LocalConversations(FileConversations):
    """Those of the user, in the order of their paths."""

    def identity(self) -> dict[str, Any]:
        """Return the name, size and SHA-256 of every file.

        Raises:
            UserError: there is no folder or no file, or something in the folder cannot be read.
        """
        paths = [self.files.root / name for name in self.files.all_names]
        files = [
            {"name": name, "bytes": path.stat().st_size, "sha256": sha256}
            for name, path, sha256 in zip(self.files.all_names, paths, sha256_files(paths), strict=True)
        ]
        return {"kind": "local", "files": files}

    @cached_property
    def files(self) -> LocalFiles:
        """See `FileConversations.files`.

        Raises:
            UserError: there is no folder or no file, a file is text without rows, or DVC could not read something there.
        """
        files = find_files(Path(self.params.path), self.params.pattern, "finetune")
        texts = [name for name in files.names if kind_of_name(name) == ".txt"]
        if texts:
            raise UserError(
                f"finetune.path: {texts[0]} is text without rows, so it is unknown who says what; write it as jsonl, or leave "
                "it out with finetune.pattern."
            )
        return files


@dataclass(frozen=True)
class HubConversations(FileConversations):
    """Those that download has fetched."""

    folder: Path = HERE.conversations

    def identity(self) -> dict[str, Any]:
        """Return the repository, the commit, and the SHA-256 of every file."""
        return {"kind": "hub", **self._manifest}

    @cached_property
    def files(self) -> LocalFiles:
        """See `FileConversations.files`."""
        return LocalFiles(self.folder, list(self._manifest["files"]), [])

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        """What download wrote.

        Raises:
            UserError: there are no conversations, or a file is missing or damaged.
        """
        manifest = read_json(self.folder / MANIFEST)
        if not manifest.get("files"):
            raise UserError(
                f"finetune.source: hub reads {self.folder}, and it has no conversations; name them in download.conversations "
                "and run dvc repro."
            )
        for name, file in manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or sha256_file(path) != file["sha256"]:
                raise UserError(
                    f"{path} is missing or damaged, so conversations would be lost; {how_to_repair(str(self.folder))}."
                )
        return manifest
