"""The model of a run: of the workspace, of another checkout, or out of DVC's cache, where nothing is checked out."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelib.errors import UserError
from pipelib.inspection.runs import find_run
from pipelib.model.weights import CONFIG
from pipelib.workspace.dvc import Out, is_sound, objects_folder
from pipelib.workspace.places import HERE, ChatPlaces, Places


def workspace_model(places: Places = HERE) -> Path:
    """Return the model of a checkout: the one that answers, if there is one."""
    answers = ChatPlaces(places.chat).model
    return answers if answers.is_dir() else places.model


@contextmanager
def model_of_run(name: str) -> Iterator[Path]:
    """Make a folder with the model of a run, the one that answers if there is one. It is removed at the end.

    Args:
        name: see `find_run`.

    Raises:
        UserError: there is no such run, or its model is not in the cache or damaged.
    """
    run = find_run(name)
    if Places(Path(run.where)).params.is_file():
        yield workspace_model(Places(Path(run.where)))
        return
    files = _model_files(run.md5(str(HERE.chat)), Path("model")) or _model_files(run.md5(str(HERE.model)), Path())
    if not files:
        raise UserError(
            f"--run {name}: DVC's cache does not have the model of this run, so there is nothing to read; `dvc fetch "
            f"--all-commits` gets what a remote has, and `dvc exp run` or `dvc repro` makes it again."
        )
    for path, kept in files.items():
        if not (kept.is_file() and is_sound(kept)):
            raise UserError(
                f"--run {name}: {path} is missing or damaged in DVC's cache ({kept}), so its model cannot be read; delete that "
                "file, and get it again with `dvc fetch --all-commits`."
            )
    with tempfile.TemporaryDirectory(prefix="pipelib-run-") as folder:
        for path, kept in files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).symlink_to(kept.absolute())
        yield Path(folder)


def _model_files(md5: str, inside: Path) -> dict[Path, Path]:
    """The objects of the files of a model in an out, by their paths in the model's folder; empty if it has none.

    Args:
        md5: of the out.
        inside: the model's folder, in the out.
    """
    out = Out(Path(), md5, objects_folder(Path.cwd()))
    entries = out.entries() if md5.endswith(".dir") else None
    found = {
        path.relative_to(inside): out.object(entry)
        for path, entry in (entries or {}).items()
        if path.is_relative_to(inside)
    }
    return found if Path(CONFIG) in found else {}
