"""A file is whole or not there, and nothing is written into bytes that somebody else may share."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import NoReturn

import pytest

from pipelib import files
from pipelib.errors import UserError
from pipelib.files import (
    files_under,
    format_bytes,
    link_or_copy,
    read_json,
    remove,
    replace_folder,
    require_free_space,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
    write_text,
)

SOURCE = Path(files.__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---- Atomic writes ---------------------------------------------------------------------------------------------------


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/a.bin"
    with write_atomic(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" whole")
    assert path.read_bytes() == b"half whole"
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with write_atomic(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_new_file_shares_no_bytes_with_the_old_one(tmp_path: Path) -> None:
    """The old one may be a hard link into DVC's cache."""
    write_text(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "cache")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "cache").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


def test_a_read_only_file_is_replaced_too(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    (tmp_path / "a").chmod(0o444)
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_what_a_killed_process_left_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".a.0123456789ab.tmp").write_text("half")
    write_text(tmp_path / "a", "whole")
    assert files_under(tmp_path) == [tmp_path / "a"]
    assert (tmp_path / "a").read_text() == "whole"


def test_a_full_disk_is_an_error_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


FILL = """
import errno, sys
from pathlib import Path
from pipelib.files import write_atomic, write_text
folder = Path(sys.argv[1])
write_text(folder / "a", "old")
try:
    with write_atomic(folder / "a") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
except OSError as error:
    assert error.errno == errno.ENOSPC
    print(sorted(path.name for path in folder.iterdir()), (folder / "a").read_text())
"""


def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a file system of one megabyte, which only the child sees."""
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1"'
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        str(tmp_path),
        sys.executable,
    ]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([*command, FILL], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.stdout == "['a'] old\n", done.stderr


# ---- JSON, hashes ----------------------------------------------------------------------------------------------------


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "é\n"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text(encoding="utf-8").startswith('{\n  "b"')
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[" * 10**5, b"9" * 5000])
def test_what_is_not_json_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not JSON .*; run `pipelib verify --repair`"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"does not exist; run the stage"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "3", "NaN", "true", "[" + "9," * 10**5 + "9]"])
def test_json_that_is_not_an_object_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json holds .{1,30} and not a JSON object with keys.*; get it again\."):
        read_json(tmp_path / "a.json", "get it again")


def test_a_folder_in_place_of_a_json_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"b": 1, "a": [True]}) == sha256_json({"a": [True], "b": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})


# ---- Folders ---------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, **contents: str) -> Path:
    for name, text in contents.items():
        write_text(folder / name.replace("__", "/"), text)
    return folder


def test_a_folder_is_replaced_by_links(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", a="new", sub__b="b")
    target = make_folder(tmp_path / "target", a="old", stale="stale")
    os.link(target / "a", tmp_path / "cache")
    replace_folder(source, target)
    assert names(target) == ["a", "sub", "sub/b"]
    assert (target / "a").samefile(source / "a")
    assert (tmp_path / "cache").read_text() == "old"
    assert names(tmp_path) == ["cache", "source", "source/a", "source/sub", "source/sub/b", "target", *(
        f"target/{name}" for name in ("a", "sub", "sub/b")
    )]  # fmt: skip


def test_a_folder_is_replaced_though_a_killed_run_left_half_of_it(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", a="new")
    make_folder(tmp_path / ".target.new", half="half")
    replace_folder(source, tmp_path / "target")
    assert names(tmp_path / "target") == ["a"]
    assert not (tmp_path / ".target.new").exists()


def test_an_error_while_linking_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = make_folder(tmp_path / "source", a="new")
    target = make_folder(tmp_path / "target", a="old")
    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        replace_folder(source, target)
    assert (target / "a").read_text() == "old"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_impossible_bytes_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    write_text(tmp_path / "a", "text")
    link_or_copy(tmp_path / "a", tmp_path / "sub/b")
    assert (tmp_path / "sub/b").read_text() == "text"
    assert not (tmp_path / "sub/b").samefile(tmp_path / "a")


def test_temporary_files_are_no_files_of_a_folder(tmp_path: Path) -> None:
    make_folder(tmp_path, b="b", sub__a="a")
    (tmp_path / ".b.1.tmp").write_text("half")
    assert files_under(tmp_path) == [tmp_path / "b", tmp_path / "sub/a"]


def test_remove_takes_whatever_is_there(tmp_path: Path) -> None:
    kept = make_folder(tmp_path / "kept", a="a")
    (tmp_path / "link").symlink_to(kept)
    make_folder(tmp_path / "folder/deep", a="a")
    for name in ("link", "folder", "none"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept", "kept/a"]


# ---- Space -----------------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 3_000_000))
    require_free_space(tmp_path / "new", 3_000_000, "tokenization")
    with pytest.raises(UserError, match=r"tokenization needs 28\.5 GB and .*new has 3\.0 MB free.*pipelib clean"):
        require_free_space(tmp_path / "new", 28_500_000_000, "tokenization")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (28_518_193_415, "28.5 GB"), (2e13, "20.0 TB")]
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text
