"""Work in progress, kept outside the outs, so that a killed stage resumes where it stopped.

DVC deletes a stage's outs before it runs the stage, and queued experiments run in a temporary folder. So each stage works
in `STATE/STAGE/FINGERPRINT/`. STATE is `$PIPELIB_STATE_DIR`, else `.pipelib` in the workspace that started DVC.
FINGERPRINT identifies the stage's parameters and data. The folder holds:

    lock          held while a stage works here
    meta.json     the code and inputs of this state; once finished, the SHA-256 of every file in final/
    work/         work in progress, in any form that the stage chooses
    final/        the finished outs, under their paths in the workspace; the outs are hard links to them
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelib.errors import UserError, tell
from pipelib.files import (
    files_under,
    read_json,
    remove,
    replace_folder,
    sha256_files,
    sha256_json,
    write_atomic,
    write_json,
)
from pipelib.workspace.locks import LOCK, locked
from pipelib.workspace.places import containing_out, state_root
from pipelib.workspace.provenance import changed

META = "meta.json"


def finished_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a state folder's final/, by path; empty if the work is not finished."""
    try:
        final = read_json(folder / META).get("final")
    except UserError:
        return {}
    return dict(final) if isinstance(final, dict) else {}


class WorkDir:
    """One stage's state for one set of inputs, locked while the `with` block lasts.

    On entry there is unfinished work to resume, finished outs to publish, or nothing. Finished outs are verified against
    their hashes, and deleted if they are damaged or were made by other code.
    """

    def __init__(self, stage: str, inputs: Mapping[str, object], code: Mapping[str, str]) -> None:
        """Args:
        stage: its name.
        inputs: everything that decides the result: parameters, fingerprints of data. Its hash names the folder.
        code: the code that makes the result: see `provenance.code_hashes`.
        """
        self.inputs, self.code = dict(inputs), dict(code)
        self.fingerprint = sha256_json(self.inputs)
        self.folder = state_root() / stage / self.fingerprint[:16]
        self.work, self.final = self.folder / "work", self.folder / "final"
        self.resumed_with_other_code = False
        self.is_fresh = True
        """Whether the stage starts from nothing: there was no earlier work, or it was deleted."""
        self._meta = self.folder / META

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # releases the lock if `_decide` raises
            stack.enter_context(locked(self.folder / LOCK))
            self._decide()
            self._lock = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def finished(self) -> bool:
        """Whether final/ holds complete outs."""
        return "final" in self._read_meta()

    def finish(self) -> None:
        """Declare the files in work/outs complete: they become final/, and the rest of work/ is deleted."""
        outs = self.work / "outs"
        assert outs.is_dir(), f"{outs} was not made"
        remove(self.final)
        paths = files_under(outs)
        # Hash first: after the rename, only the small meta.json is left to write.
        hashes = dict(zip((path.relative_to(outs).as_posix() for path in paths), sha256_files(paths), strict=True))
        outs.rename(self.final)
        # Only this line makes final/ count: after a kill before it, the next run builds the outs again.
        write_json(self._meta, {**self._read_meta(), "final": hashes})
        remove(self.work)

    def publish(self) -> None:
        """Put the finished outs at their paths in the workspace, and replace what is there.

        An out that is a folder (data/raw, models) is replaced as a whole. Metrics are single files.
        """
        for folder in sorted({containing_out(Path(name)) for name in self._read_meta()["final"]} - {None}, key=str):
            assert folder is not None
            replace_folder(self.final / folder, folder)
        for name in self._read_meta()["final"]:
            if containing_out(Path(name)) is None:
                with write_atomic(Path(name)) as file:  # git tracks it, so it must not share bytes with the state
                    file.write((self.final / name).read_bytes())

    def require_same_code(self) -> None:
        """Refuse to join the work of another machine, which holds the lock, unless that machine runs the same code.

        Raises:
            UserError: there is no such work, or other code does it.
        """
        code = self._read_meta().get("code")
        if code is None:
            raise UserError(
                f"there is no {self._meta.absolute()}, so there is nothing to join; all machines need the same "
                "params.yaml, and the same checkout and state folder (PIPELIB_STATE_DIR) on a file system that they share."
            )
        if code != self.code:
            raise UserError(
                f"{self.folder} is in use by a machine with other code: {changed(code, self.code)} differ, so the two would "
                "compute different results; give both the same checkout and the same packages."
            )

    def _read_meta(self) -> dict[str, dict[str, str]]:
        """Read meta.json.

        `code`, `mixed` (other code that also worked here) and, once finished, `final` map paths to SHA-256. `inputs` is there
        for people.
        """
        if not self._meta.exists():
            return {}
        remedy = f"remove {self.folder}, and run dvc repro to do its work again"
        meta = read_json(self._meta, remedy)
        if meta and not (
            isinstance(meta.get("code"), dict) and all(isinstance(value, dict) for value in meta.values())
        ):
            raise UserError(
                f"{self._meta} does not say which code made the files beside it, so they cannot be used; {remedy}."
            )
        return meta

    def _decide(self) -> None:
        """Decide which of the folder's content to keep, and record the code that works here from now on."""
        meta = self._read_meta()
        choice = os.environ.get("PIPELIB_RESUME", "")
        if choice not in ("", "continue", "fresh"):
            raise UserError(
                f"PIPELIB_RESUME={choice} is neither continue nor fresh, so it is unclear what to keep; set one "
                "of them, or unset it."
            )
        # Finished outs of other code are useless; unfinished work of other code may be hours of training, so ask.
        if choice == "fresh" or ("final" in meta and (meta["code"] != self.code or self._damaged(meta["final"]))):
            meta = {}
        elif meta and "final" not in meta and meta["code"] != self.code and self._work_to_lose():
            if choice != "continue":
                raise UserError(self._other_code(meta["code"]))
            meta = {**meta, "mixed": {**meta.get("mixed", {}), **meta["code"]}}  # kept in all later runs
        if not meta:
            for entry in (self._meta, self.work, self.final):
                remove(entry)
        elif "final" in meta:
            remove(self.work)  # `finish` may have been killed before it removed work/
        self.resumed_with_other_code, self.is_fresh = "mixed" in meta, not meta
        write_json(self._meta, {**meta, "inputs": self.inputs, "code": self.code})
        self.work.mkdir(exist_ok=True)

    def _work_to_lose(self) -> bool:
        """Return whether work/ holds anything besides outs, which every run builds again."""
        return self.work.is_dir() and any(path.name != "outs" for path in self.work.iterdir())

    def _damaged(self, hashes: Mapping[str, str]) -> list[str]:
        """Return the finished files that are missing or damaged, and print each, because bad hardware may be the cause."""
        here = [name for name in hashes if (self.final / name).is_file()]
        actual = dict(zip(here, sha256_files([self.final / name for name in here]), strict=True))
        bad = [name for name, sha256 in hashes.items() if actual.get(name) != sha256]
        for name in bad:
            tell(f"{self.final / name} is missing or damaged, so the finished state is deleted and made again")
        return bad

    def _other_code(self, before: Mapping[str, str]) -> str:
        return (
            f"{self.folder} contains unfinished work of another version of the code: {changed(before, self.code)} changed "
            "since. Resuming would mix the two in one result. Choose: PIPELIB_RESUME=continue resumes anyway (the model's "
            "record says so), PIPELIB_RESUME=fresh starts again; then run dvc repro."
        )
