"""Open the user's files as text: unpacked, decoded, and refused if they are not what their names say."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelib.corpus.params import encoding_name
from pipelib.errors import UserError

_STRAY = "\udcff"
"""Stands for a stray byte while its line is looked for. It cannot be in decoded text."""
_LONGEST = 64  # bytes at the start of a file that are enough to tell its kind

UNPACKERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")),
}
"""How compressed files are opened, by the ending of their names."""
_OWN = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".parquet": b"PAR1\x15"}
"""The first bytes of files of each kind."""
_FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\n": "a pointer of git LFS, not the text; run `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex, not the text; run `git annex get`",
    _OWN[".gz"]: "compressed by gzip; end its name in .gz (.jsonl.gz), or unpack it",
    _OWN[".zst"]: "compressed by zstd; end its name in .zst (.jsonl.zst), or unpack it",
    b"BZh91AY&SY": "compressed by bzip2; end its name in .bz2 (.jsonl.bz2), or unpack it",
    _OWN[".xz"]: "compressed by xz; end its name in .xz (.jsonl.xz), or unpack it",
    _OWN[".parquet"]: "parquet; name it .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"%PDF-": "a PDF; extract its text",
}
"""The first bytes of files that are not what their names say, with what they are and what to do."""
_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8",
}  # fmt: skip
"""The byte order marks."""


class Decoding:
    """How bytes become text. It counts the stray bytes that it replaces.

    Args:
        encoding: `download.encoding`.
        stray_bytes: `download.stray_bytes`: refuse, or replace each by U+FFFD.
        section: the section of params.yaml with these two; empty if the user cannot set them.
    """

    def __init__(self, encoding: str, stray_bytes: str, section: str = "download") -> None:
        self._section, self._stray_bytes = section, stray_bytes
        self.encoding = encoding_name(encoding) or encoding
        self.replaced = 0
        """Stray bytes so far."""
        self.errors = "strict"
        """The name of the error handler that Python's decoders know."""
        if stray_bytes == "replace":
            self.errors = f"pipelib {id(self)}"
            codecs.register_error(self.errors, self._replace)

    def __reduce__(self) -> tuple[type["Decoding"], tuple[str, str, str]]:
        """Another process gets one that has replaced nothing yet: codecs know the error handler by its name."""
        return Decoding, (self.encoding, self._stray_bytes, self._section)

    def _replace(self, error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        self.replaced += error.end - error.start
        return "\ufffd", error.end

    def decode(self, value: bytes, *, is_utf8: bool) -> str:
        """Decode a value of a table.

        Args:
            is_utf8: whether its column is of strings, which are UTF-8; bytes have the encoding of text files.

        Raises:
            UnicodeDecodeError: it has stray bytes, which are not replaced.
        """
        return value.decode("utf-8" if is_utf8 else self.encoding, self.errors)

    @contextmanager
    def open(
        self, path: Path, name: str, newline: str | None = None, start: int = 0, end: int | None = None
    ) -> Iterator[io.TextIOWrapper]:
        """Open a file as text: unpacked if its name says so, and without a byte order mark.

        Args:
            name: what messages call the file.
            newline: None makes every line end `\\n`; "" leaves them as they are.
            start: the byte from which to read.
            end: the byte before which to end, if not at the end. What is between is held in memory.

        Raises:
            UserError: it has another encoding, is empty although compressed, or is of another kind than its name says.
        """
        with open_bytes(path) as file:
            head = file.peek(_LONGEST)
            # The content may be compressed twice, or have another encoding.
            what = f"{name}, unpacked," if path.suffix.lower() in UNPACKERS else name
            require_kind(head, "", what)
            encoding = self.encoding
            marked = next((marked for mark, marked in _MARKS.items() if head.startswith(mark)), "")
            if marked and not self.encoding.startswith(marked):  # utf-16 is the mark of utf-16-le, too
                remedy = f"convert it (iconv -f {marked.upper()} -t UTF-8)"
                raise UserError(
                    f"{what} is {marked.upper()}. It was not read, because its text would be wrong; "
                    f"{self._remedy(f'encoding: {marked}, or {remedy}', remedy)}."
                )
            if start or end is not None:
                file.seek(start)
                file = io.BytesIO(file.read(-1 if end is None else end - start))  # a decoder reads ahead
            if marked:
                encoding = "utf-8-sig" if marked == "utf-8" else marked  # these leave out the mark
            yield io.TextIOWrapper(file, encoding=encoding, errors=self.errors, newline=newline)

    def not_text(self, path: Path, name: str) -> UserError:
        """Return the error for a file that has a NUL character or stray bytes, with the first such line."""
        found: list[UnicodeDecodeError] = []

        def mark(error: UnicodeError) -> tuple[str, int]:
            assert isinstance(error, UnicodeDecodeError)
            found.append(error)
            return _STRAY, error.end

        codecs.register_error("pipelib find", mark)
        number = 0
        with (
            suppress(OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError),
            open_bytes(path) as file,
            io.TextIOWrapper(file, encoding=self.encoding, errors="pipelib find") as text,
        ):
            for number, line in enumerate(text, start=1):
                stray, nul = line.find(_STRAY), line.find("\0")
                if found and stray >= 0 and not 0 <= nul < stray:
                    byte = found[0].object[found[0].start]
                    return UserError(
                        f"{name}, line {number}: there is the byte 0x{byte:02x}, which is not {self.encoding.upper()}, so the "
                        "file has another encoding or is damaged, and its text would be wrong; "
                        f"{self._remedy('encoding (for example cp1252), or download.stray_bytes: replace')}."
                    )
                if nul >= 0:
                    return UserError(
                        f"{name}, line {number}: there is a NUL byte, so the file has another encoding or is damaged, and its "
                        f"text would be wrong; {self._remedy('encoding (for example utf-16), or get it again')}."
                    )
        return UserError(
            f"{name} is not {self.encoding.upper()}, so its text would be wrong; {self._remedy('encoding to its encoding')}."
        )

    def _remedy(self, setting: str, otherwise: str = "convert it to UTF-8 (iconv), or get it again") -> str:
        return f"set {self._section}.{setting}" if self._section else otherwise


def open_bytes(path: Path) -> Any:
    """Open a file as bytes, unpacked if its name says so. The stream can be read by lines, and has `peek`."""
    unpack = UNPACKERS.get(path.suffix.lower())
    return unpack(path) if unpack else path.open("rb")


def require_kind(head: bytes, ending: str, name: str) -> None:
    """Refuse a file that begins like one of another kind.

    Args:
        head: its first bytes.
        ending: the ending of its name, whose own first bytes are allowed.

    Raises:
        UserError: with what it is and what to do.
    """
    for start, what in _FOREIGN.items():
        if head.startswith(start) and not (ending in _OWN and start.startswith(_OWN[ending])):
            raise UserError(f"{name} is {what}. It was not read, because its text would be wrong.")


def require_intact(path: Path, name: str) -> None:
    """Refuse a file that is of another kind than its name says, or compressed and empty.

    Raises:
        UserError: see `require_kind`.
        EOFError: it is empty.
    """
    ending = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(_LONGEST)
    if not head and ending in UNPACKERS:
        raise EOFError("it is empty")  # gzip and zstd would read it as empty text
    require_kind(head, ending, name)


def damaged_file(name: str, number: int, error: Exception) -> UserError:
    """Return the error for a file that cannot be read to its end.

    Args:
        number: the last row that could be read.
    """
    why = " ".join(str(error).split()) or type(error).__name__
    if "too much memory" in why:  # libzstd's message for a window of more than 128 MB
        return UserError(
            f"{name} was compressed with a long window (zstd --long), which needs more memory than allowed here, so it "
            "was not read; compress it again: zstd -d --long=31 -c FILE | zstd -o NEW_FILE."
        )
    return UserError(
        f"{name} cannot be read after row {number} ({why}), so it is damaged or cut short and text would be lost; get or "
        "make it again, or move it away."
    )
