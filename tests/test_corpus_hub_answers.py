"""Answers that are not the hub's, lists with gaps, and variables that cannot work: each ends at once and says why."""

import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, Self

import huggingface_hub.constants
import huggingface_hub.utils
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_hub import Answer, FakeHub, Handler, entry_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_corpus_hub import (
    ASKED,
    END,
    FILE,
    FOLDER,
    GET,
    LIST,
    NAMES,
    QUICK,
    REPO,
    REVISION,
    fetch,
    hub,
    one_file,
    parameters,
    parquet_bytes,
    point_at,
    source,
    state,
)

from pipelib.cli.main import main
from pipelib.corpus.benchmarks import hub_rows
from pipelib.corpus.download import download
from pipelib.corpus.hub_lists import HubFile, HubFolder, HubPin, list_files, parse_list
from pipelib.corpus.hub_store import fetch_pinned
from pipelib.corpus.hub_transfer import HubRepo, UnexpectedAnswerError, _retry_after, get_list
from pipelib.corpus.parquet import iterate_raw, require_text
from pipelib.corpus.sources.hub import HubSource, _schema
from pipelib.errors import UserError
from pipelib.files import read_json, sha256_json, write_json

__all__ = ["hub", "one_file", "state"]  # fixtures

SAME_FIXTURES = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def fresh_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client reads proxies and certificates when it makes its session: a new one for each test."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "SSL_CERT")) or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    huggingface_hub.utils.close_session()
    yield
    huggingface_hub.utils.close_session()


def kept_lists(folder: Path) -> list[Path]:
    return list(folder.rglob(".lists/*.json"))


def no_list_is_kept(folder: Path) -> bool:
    return not kept_lists(folder)


# ---- Lists -----------------------------------------------------------------------------------------------------------

ENTRY: dict[str, Any] = {"type": "file", "path": FILE, "size": 9, "lfs": {"oid": "0" * 64}}


def entries(*changes: dict[str, Any]) -> bytes:
    return json.dumps([{**ENTRY, **change} for change in changes]).encode()


def without(key: str) -> bytes:
    return json.dumps([{name: value for name, value in ENTRY.items() if name != key}]).encode()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(b"<html>log in</html>", "text/html; charset=utf-8"), "an HTML page instead of JSON"),
        (Answer(b"", "text/plain"), "text/plain instead of JSON"),
        (Answer(b"\xff\xfe\x80", ""), "something instead of JSON"),
        (Answer(b'{"error": "hf_secret"}'), "JSON that is not a list but dict"),
        (Answer(b'"text"'), "JSON that is not a list but str"),
        (Answer(b"null"), "JSON that is not a list but NoneType"),
        (Answer(b"[]"), "an empty list"),
        (Answer(b"[1]"), "an entry that is not like the hub's"),
        (Answer(b"[[]]"), "an entry that is not like the hub's"),
        (Answer(without("type")), "an entry that is not like the hub's"),
        (Answer(without("path")), "an entry that is not like the hub's"),
        (Answer(without("size")), "an entry that is not like the hub's"),
        (Answer(entries({"type": 1})), "an entry that is not like the hub's"),
        (Answer(entries({"path": 1})), "an entry that is not like the hub's"),
        (Answer(entries({"path": "a\0b"})), "an entry that is not like the hub's"),
        (Answer(entries({"path": "\ud800"})), "an entry that is not like the hub's"),
        (Answer(entries({"path": "a" * 2000})), "an entry that is not like the hub's"),
        (Answer(entries({"size": -1})), "an entry that is not like the hub's"),
        (Answer(entries({"size": True})), "an entry that is not like the hub's"),
        (Answer(entries({"size": 1.0})), "an entry that is not like the hub's"),
        (Answer(entries({"size": "1"})), "an entry that is not like the hub's"),
        (Answer(entries({"lfs": []})), "an invalid SHA-256"),
        (Answer(entries({"lfs": {"oid": "abc"}})), "an invalid SHA-256"),
        (Answer(entries({"lfs": {"oid": None}})), "an invalid SHA-256"),
        (Answer(entries({}, {})), f"names {FILE} twice"),
        (Answer(b"", status=301), "HTTP 301"),
        (Answer(b"", status=204), "HTTP 204"),
        (Answer(entries({}), headers={"Link": '<http://[/?cursor=1>; rel="next"'}), "next page is damaged"),
    ],
)
def test_an_answer_that_is_not_the_hubs_ends_at_once(hub: FakeHub, tmp_path: Path, answer: Answer, reason: str) -> None:
    hub.listed = answer
    with pytest.raises(UserError) as caught:
        source().identity()
    assert f"from {hub.url} cannot be downloaded (" in str(caught.value)
    assert reason in str(caught.value)
    assert "check HF_ENDPOINT" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert hub.requests == [LIST]
    assert no_list_is_kept(tmp_path)
    hub.listed = None
    assert len(source().identity()["files"]) == 3


@pytest.mark.parametrize(
    "answer",
    [
        Answer(b'[{"type": "file", "pa'),
        Answer(b"[" * 100_000),
        Answer(b"[" + b"1" * 5000 + b"]"),
        Answer(b"no gzip", headers={"Content-Encoding": "gzip"}),
    ],
)
def test_a_list_that_is_damaged_on_its_way_is_asked_for_again(hub: FakeHub, tmp_path: Path, answer: Answer) -> None:
    hub.listed = answer
    with pytest.raises(UserError, match="could not be downloaded in 4 attempts"):
        source().identity()
    assert hub.requests == [LIST] * 4
    assert no_list_is_kept(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "path", "size", "lfs", "oid", "error"]), inner, max_size=5)
    ),
    max_leaves=12,
)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("file") | JSON,
            "path": st.builds(f"{FOLDER}/{{}}".format, st.text(max_size=3)) | JSON,
            "size": st.integers(-1, 9) | JSON,
            "lfs": st.just({"oid": "a" * 64}) | JSON,
        },
    )
    | JSON,
    max_size=4,
)


@settings(max_examples=100, deadline=None, database=None)
@given(answer=ENTRIES)
@example(answer=[ENTRY])
def test_a_list_is_what_the_hub_would_give_or_refused(answer: list[Any]) -> None:
    try:
        files = parse_list(json.loads(json.dumps(answer)), HubFolder(FOLDER))
    except UnexpectedAnswerError:
        return
    paths = [file.path for file in files]
    assert paths == sorted(set(paths))
    for file in files:
        assert type(file.bytes) is int
        assert file.bytes >= 0
        assert file.sha256 == "" or len(bytes.fromhex(file.sha256)) == 32
        assert os.fsencode(file.path).decode().rpartition("/")[0] == FOLDER


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=SAME_FIXTURES)
@given(
    status=st.sampled_from(
        [200, 200, 200, 203, 206, 300, 301, 302, 304, 307, 400, 401, 403, 404, 407, 410, 451, 501, 599]
    ),
    kind=st.sampled_from(
        ["application/json", "text/html", "application/octet-stream", "", "é", "text/html; charset=nonsense"]
    ),
    body=st.binary(max_size=20) | ENTRIES.map(lambda value: json.dumps(value).encode()),
    link=st.sampled_from(
        ["", "<", "<>; rel=next", '<?cursor=1>; rel="next"', "rel=next", ",;<=>", '<//[>; rel="next"']
    ),
    location=st.sampled_from(["", "/", "ftp://127.0.0.1/", "http://[", "//", "?x"]),
    names=st.booleans(),
)
def test_any_answer_ends_in_a_list_or_in_a_message(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, status: int, kind: str,
    body: bytes, link: str, location: str, names: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(folder))
    headers = {name: value for name, value in {"Link": link, "Location": location}.items() if value}
    answer = Answer(b"" if status in (204, 304) else body, kind, status, headers)
    hub.listed, hub.named = (None, answer) if names else (answer, None)
    before = len(hub.requests)
    try:
        files = source(retry=dataclasses.replace(QUICK, attempts=2)).identity()["files"]
    except UserError as error:
        assert REPO in str(error)  # noqa: PT017  (either is right)
        assert no_list_is_kept(folder)
    else:
        assert len(kept_lists(folder)) == 1
        assert all(len(file["sha256"]) == 64 for file in files)
    assert len(hub.requests) - before < 50


def test_a_list_without_a_hash_of_a_file_that_is_needed_is_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    repo = HubRepo(REPO, REVISION)
    hub.files = {FILE: b"12345", f"{FOLDER}/note.md": b"12345"}
    listed = [entry_of(name, content) for name, content in hub.files.items()]
    hub.listed = Answer(json.dumps([{**listed[0], "lfs": None, "oid": None}, listed[1]]).encode())
    with pytest.raises(UserError, match=rf"from {hub.url} has no hash of {FILE}, .*another mirror"):
        source().identity()
    assert no_list_is_kept(tmp_path)
    hub.listed = Answer(json.dumps([listed[0], {**listed[1], "lfs": None, "oid": "not SHA-1"}]).encode())
    assert len(source().identity()["files"]) == 1
    before = len(hub.requests)
    with pytest.raises(UserError, match=r"has no hash of .*note\.md"):  # the list that is kept does not do
        list_files(repo, FOLDER, ".md", QUICK)
    hub.listed = None
    assert len(list_files(repo, FOLDER, ".md", QUICK)) == 1
    assert hub.requests[before:] == [LIST, NAMES] * 2


def test_a_list_of_which_a_mirror_gives_the_first_page_alone_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.page, hub.next_at = 2, ""
    with pytest.raises(
        UserError, match=rf"from {hub.url} .*leaves out 2 of 4 files, {FOLDER}/002_00000\.parquet first"
    ):
        source().identity()
    assert hub.requests == [LIST, NAMES]
    assert no_list_is_kept(tmp_path)


def test_a_next_page_that_cannot_be_had_keeps_nothing(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.page = 2
    tree = Handler._tree

    def broken(handler: Handler, revision: str, folder: str) -> None:
        if "cursor" in handler.path:
            handler._refuse(500, "")
        else:
            tree(handler, revision, folder)

    monkeypatch.setattr(Handler, "_tree", broken)
    with pytest.raises(UserError, match=r"in 4 attempts \(HTTP 500"):
        source().identity()
    assert no_list_is_kept(tmp_path)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_in_html_may_be_the_proxys(hub: FakeHub, status: int) -> None:
    hub.listed = Answer(b"<html>blocked</html>", "text/html", status)
    with pytest.raises(UserError, match=rf"HTTP {status} .*perhaps a proxy refuses, not the hub"):
        source().identity()
    assert hub.requests == [LIST]


@pytest.mark.parametrize("repo", ["a/", "/b", "a/b c", "a/--b", "ü/b", "a/b?x", "a/.."])
def test_a_name_that_no_repository_can_have_ends_before_a_request(hub: FakeHub, repo: str) -> None:
    with pytest.raises(UserError, match=r"download\.repo: this is not a valid name on the hub"):
        source(repo=repo).identity()
    assert hub.requests == []


@settings(max_examples=200, deadline=None, database=None)
@given(
    value=st.text(max_size=30)
    | st.builds(
        "Wed, {} {} {} {} {}".format,
        st.integers(0, 99),
        st.sampled_from(["Jan", "Oct", "x"]),
        st.integers(0, 99_999),
        st.sampled_from(["07:28:00", "99:99:99", "0:2200000000", ""]),
        st.sampled_from(["GMT", "+9999", "+99999999999999", ""]),
    )
)
@example(value="0 JAN 0 0:2200000000")
@example(value="9" * 400)
def test_any_wish_to_wait_is_a_time_or_nothing(value: str) -> None:
    wish = _retry_after(SimpleNamespace(response=SimpleNamespace(headers={"Retry-After": value})))  # type: ignore[arg-type]
    assert wish is None or 0 <= QUICK.seconds(1, wish) <= QUICK.max_wait


def test_pages_without_an_end_are_refused(hub: FakeHub) -> None:
    hub.listed = Answer(entries({}), headers={"Link": f'<{hub.url}/x?cursor=1>; rel="next"'})
    with pytest.raises(UserError, match="its pages do not end"):
        source().identity()
    assert hub.requests == [LIST, LIST]


def test_the_next_page_is_asked_of_the_endpoint_and_the_token_goes_nowhere_else(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with FakeHub(REPO, REVISION, hub.files) as other:
        for place in (other.url, hub.url.replace("127.0.0.1", "localhost"), "https://huggingface.co", "//host"):
            hub.page, hub.next_at = 1, place
            assert len(parse_list(_ask(hub), HubFolder(FOLDER))) == 4
        assert other.requests == []
    assert hub.requests == [LIST] * 16
    assert all(hub.authorized)


def _ask(hub: FakeHub) -> list[Any]:
    return get_list(hub.url + LIST.removeprefix("GET "))


@pytest.mark.parametrize("names", [Answer(b"", status=404), Answer(b"<html>", "text/html"), Answer(b"{}"), Answer(b"[1]"),
    Answer(b'{"siblings": [1]}'), Answer(b'{"siblings": [{"rfilename": null}]}')])  # fmt: skip
def test_a_mirror_that_does_not_name_files_is_said(
    hub: FakeHub, names: Answer, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.named = names
    assert len(source().identity()["files"]) == 3
    assert f"{hub.url} does not name the files of {REPO}, so it could not be checked" in capfd.readouterr().out


def test_a_mirror_that_answers_for_another_commit_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.named = Answer(json.dumps({"sha": "c" * 40, "siblings": []}).encode())
    with pytest.raises(UserError, match=f"the answer is about commit '{'c' * 40}'"):
        source().identity()
    assert no_list_is_kept(tmp_path)


def test_names_that_fail_in_passing_are_asked_for_again(hub: FakeHub) -> None:
    hub.named = Answer(b"", status=503)
    with pytest.raises(UserError, match="503"):
        source().identity()
    assert hub.requests == [LIST, *[NAMES] * 4]


def test_a_list_of_an_earlier_version_is_asked_for_again_and_does_offline(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"state/hub/someone--corpus/{REVISION}/.lists/sample%2Ftiny.json"
    short = [HubFile(FILE, 1, "0" * 64).identity()]  # as before there was `git_sha1`
    write_json(path, {"files": short, "sha256": sha256_json(short)})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert source().identity()["files"] == short
    assert hub.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert len(source().identity()["files"]) == 3
    assert hub.requests == [LIST, NAMES]
    assert read_json(path)["endpoint"] == hub.url


def test_a_wrong_list_of_another_endpoint_is_named_and_can_be_deleted(
    hub: FakeHub, one_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub(REPO, REVISION, {FILE: one_file[:-1] + b"x"}) as mirror:
        point_at(mirror.url.replace("//", "//user:hf_secret@"), monkeypatch)
        source().identity()
    point_at(hub.url, monkeypatch)
    message = (
        rf"came from {mirror.url}; .*`pipelib clean --stage lists` deletes them, and the next run asks {hub.url}\."
    )
    with pytest.raises(UserError, match=rf"its hash differs .* {message}"):
        fetch(tmp_path / "raw")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert main(["clean", "--stage", "lists", "--yes"]) == 0
    assert fetch(tmp_path / "again") == one_file


def test_the_lists_of_the_top_folder_and_of_a_folder_named_top_are_two(hub: FakeHub) -> None:
    hub.files = {"a.parquet": b"1", "top/b.parquet": b"2"}
    assert [source(folder=folder).identity()["files"][0]["path"] for folder in ("", "top", "", "top")] == [
        *hub.files,
        *hub.files,
    ]
    assert len(hub.requests) == 4


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=SAME_FIXTURES)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@pytest.mark.usefixtures("hub")
def test_a_flipped_bit_anywhere_in_a_kept_list_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path_factory.mktemp("state")))
    identity = source().identity()
    (path,) = kept_lists(Path(os.environ["PIPELIB_STATE_DIR"]))
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    assert source().identity() == identity


# ---- The end of the first file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"page": ["x"], "id": ["y"]}, rf"{FILE} of {REPO} has no column `text` \(it has page, id\)"),
        ({"text": [1, 2]}, rf"{FILE} of {REPO}: the column `text` holds int64, not strings"),
        ({"text": [["x"]]}, "holds list<element: string>, not strings"),
    ],
)
def test_a_dataset_without_text_is_refused_by_the_end_of_its_first_file(
    hub: FakeHub, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    noise = [random.Random(row).randbytes(50_000).hex() for row in range(len(next(iter(columns.values()))))]
    hub.files[FILE] = parquet_bytes(**columns, noise=noise)
    for max_tokens in (None, 1):
        with pytest.raises(UserError, match=message.replace("page, id", "page, id, noise")):
            source(max_tokens=max_tokens).write(tmp_path / "raw", tmp_path / "work")
    assert hub.requests == [*ASKED, END]
    assert hub.peeked == [min(len(hub.files[FILE]), 65536)] * 2
    assert hub.sent == 0


def test_long_metadata_takes_a_second_request(hub: FakeHub, tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"words": ["x" * 100] * 4000, "n": range(4000)}), sink, row_group_size=10)
    hub.files[FILE] = content = sink.getvalue().to_pybytes()
    with pytest.raises(UserError, match=r"has no column `text` \(it has words, n\)"):
        source().write(tmp_path / "raw", tmp_path / "work")
    assert hub.peeked == [65536, int.from_bytes(content[-8:-4], "little") + 8]
    assert hub.sent == 0


@pytest.mark.parametrize("ending", ["", "no parquet at all", "PAR1"])
def test_where_the_end_says_nothing_the_first_file_is_fetched_before_the_others(
    hub: FakeHub, tmp_path: Path, ending: str
) -> None:
    hub.knows_ranges = bool(ending)
    hub.files[FILE] = ending.encode() or parquet_bytes(page=["x"])
    with pytest.raises(UserError, match=r"000_00000\.parquet (has no column `text`|cannot be read as parquet)"):
        source().write(tmp_path / "raw", tmp_path / "work")
    assert hub.gets() == [GET]
    hub.files[FILE] = parquet_bytes(text=["x"])
    assert main(["clean", "--yes"]) == 0
    assert len(source().write(tmp_path / "again", tmp_path / "work").files) == 3


def test_what_is_stored_is_not_asked_for_its_end(hub: FakeHub, tmp_path: Path) -> None:
    source().write(tmp_path / "raw", tmp_path / "work")
    source().write(tmp_path / "again", tmp_path / "work")
    assert len(hub.peeked) == 1


@settings(max_examples=200, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_end_of_a_file_says_nothing_or_something_and_never_crashes(data: st.DataObject) -> None:
    content = parquet_bytes(text=["a", "b"], n=[1, 2])
    footer = bytearray(content[-8 - int.from_bytes(content[-8:-4], "little") :])
    for place in data.draw(st.lists(st.integers(0, len(footer) - 1), min_size=1, max_size=4)):
        footer[place] = data.draw(st.integers(0, 255))
    schema = _schema(bytes(footer))
    if schema is not None:
        with suppress(UserError):
            require_text(schema, "x", "")


# ---- Files -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=SAME_FIXTURES)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_file_is_noticed_and_the_file_fetched_again(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(folder / "state"))

    def flip(handler: Handler, body: bytes) -> None:
        damaged = bytearray(body)
        damaged[place % len(body)] ^= 1 << bit
        handler.send_file(bytes(damaged))

    hub.requests.clear()
    hub.faults = [flip]
    source().write(folder / "raw", folder / "work")
    for name in ("000_00000", "001_00000", "002_00000"):
        assert (folder / f"raw/{name}.parquet").read_bytes() == hub.files[f"{FOLDER}/{name}.parquet"]
    assert len(hub.gets()) == 4


@pytest.mark.usefixtures("one_file")
def test_a_page_for_people_instead_of_a_file_ends_at_once(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(handler: Handler, *_: object) -> None:
        handler._send_answer(Answer(b"<html>", "text/html"))

    source().identity()
    monkeypatch.setattr(Handler, "_file", page)
    with pytest.raises(UserError, match=r"000_00000\.parquet .*an HTML page instead of the file"):
        fetch(tmp_path / "raw")
    assert hub.requests == [*ASKED, GET]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("what", ["list", "file"])
def test_a_redirect_to_another_name_of_this_machine_loses_the_token(
    hub: FakeHub, one_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with FakeHub(REPO, REVISION, hub.files) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        if what == "file":
            hub.redirect = elsewhere
        else:
            hub.listed = Answer(b"", status=307, headers={"Location": elsewhere + LIST.removeprefix("GET ")})
        assert fetch(tmp_path / "raw") == one_file
        assert other.requests == ([END, GET] if what == "file" else [LIST])
        assert not any(other.authorized)
    assert all(hub.authorized)


def test_a_benchmark_that_is_not_what_its_name_says_is_named(hub: FakeHub) -> None:
    hub.files = {"set.parquet": b"PAR1 no PAR1", "set.jsonl": b'{"a": 1}\n\xff'}
    for name in hub.files:
        with (
            fetch_pinned(HubPin(HubRepo(REPO, REVISION), name, None), QUICK) as path,
            pytest.raises(UserError, match=name),
        ):
            list(hub_rows(path))


# ---- Null texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_count", [None, [50, None, -3, 50, 0, 50]])
@pytest.mark.parametrize("max_tokens", [None, 100])
def test_null_texts_are_counted_and_never_crash(
    hub: FakeHub, tmp_path: Path, token_count: list[Any] | None, max_tokens: int | None
) -> None:
    words = [" ".join(f"d{row}w{word}" for word in range(99)) for row in range(40)]
    columns: dict[str, list[Any]] = {"text": [None, words[0], "", words[1], " \n\t", *words[2:]]}
    if token_count:
        columns["token_count"] = [*token_count, *[50] * (len(columns["text"]) - 6)]
    for name in [name for name in hub.files if name.startswith(FOLDER)]:
        del hub.files[name]
    hub.files[FILE] = parquet_bytes(**columns)
    hub.files[f"{FOLDER}/001_00000.parquet"] = parquet_bytes(text=pa.array([None, None]), id=["a", "b"])
    params = parameters(max_tokens=max_tokens, benchmark_documents=12)
    if max_tokens is not None:
        params = dataclasses.replace(params, benchmarks=(), benchmark_documents=0)
    result, _ = download(params, source(max_tokens=max_tokens), tmp_path / "outs", tmp_path)
    rows = list(iterate_raw(tmp_path / "outs/data/raw"))
    assert len(rows) == result["documents"]
    if max_tokens is None:
        assert [row["text"] for row in rows] == [*columns["text"], None, None]
        assert result["benchmark_items"]["completion"] > 0
        heldout = (tmp_path / "outs/data/benchmarks/heldout.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in heldout] == [text for text in columns["text"][:12] if text]
    else:
        assert [row["text"] for row in rows] == columns["text"][: len(rows)]
        assert result["tokens_estimated"] >= max_tokens


# ---- Variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ALL_PROXY": "socks5://user:hf_secret@127.0.0.1:1"}, "ALL_PROXY: a SOCKS proxy needs the package socksio"),
        ({"all_proxy": "socks5h://127.0.0.1:1"}, "all_proxy: a SOCKS proxy needs the package socksio"),
        ({"ALL_PROXY": "socks4://127.0.0.1:1"}, "ALL_PROXY: the address of the proxy cannot be used"),
        ({"HTTP_PROXY": "http://user:hf#hf_secret@127.0.0.1:1"}, "HTTP_PROXY: the address of the proxy cannot be used"),
        ({"HTTPS_PROXY": "http://127.0.0.1:port"}, "HTTPS_PROXY: the address of the proxy cannot be used"),
        ({"https_proxy": "http://[::1"}, "https_proxy: the address of the proxy cannot be used"),
        ({"SSL_CERT_FILE": "/none/ca.pem"}, "SSL_CERT_FILE=/none/ca.pem cannot be read as certificates (No such file"),
        ({"SSL_CERT_FILE": "/"}, "SSL_CERT_FILE=/ cannot be read as certificates (Is a directory)"),
        ({"SSL_CERT_FILE": __file__}, "cannot be read as certificates ([X509"),
        ({"HF_TOKEN": "hf_secretü"}, "HF_TOKEN has a character that cannot be sent"),
        ({"HF_TOKEN": "hf_secret\x01"}, "HF_TOKEN has a character that cannot be sent"),
    ],
)
def test_a_variable_that_cannot_work_ends_at_once(
    hub: FakeHub, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        source().identity()
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("constant", "value", "message"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", -1, "HF_HUB_DOWNLOAD_TIMEOUT=-1: no request would get an answer"),
        ("HF_HUB_USER_AGENT_ORIGIN", "a\nb", "cannot be sent, so no request can be made; write it in ASCII"),
        ("HF_TOKEN_PATH", "/", "the hub's token cannot be read from / (Is a directory)"),
        ("HF_TOKEN_PATH", sys.executable, "the hub's token cannot be read from"),
    ],
)
def test_a_constant_that_cannot_work_ends_at_once(
    hub: FakeHub, constant: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, constant, value)
    with pytest.raises(UserError) as caught:
        source().identity()
    assert message in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    "endpoint",
    ["", "huggingface.co", "localhost:8080", "127.0.0.1:1", "ftp://host", "file:///tmp", "http:/host", "http://", "http://?x",
     "http://host:port", "http://host:99999", "http://host:0",
     " http://host", "http://ho st", "http://host\x01", "https://host?token=hf_secret", "https://host#x",
     "user:hf_secret@host", "ftp://user:hf_secret@host"],
)  # fmt: skip
def test_an_endpoint_that_is_not_an_address_ends_at_once(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(endpoint, monkeypatch)
    with pytest.raises(UserError, match=r"is not the address of a hub, .*with http:// or https:// in front") as caught:
        source().identity()
    assert "secret" not in str(caught.value)


def test_an_endpoint_may_have_a_path(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(f"{hub.url}/artifacts/hub", monkeypatch)
    with pytest.raises(UserError, match="HTTP 404"):
        source().identity()
    assert hub.requests == [LIST.replace("GET ", "GET /artifacts/hub")]


@pytest.mark.parametrize(
    "variables",
    [{"HF_ENDPOINT": "http://[::1"}, {"HF_HUB_DOWNLOAD_TIMEOUT": "ten"}],
)
def test_a_variable_that_the_client_cannot_read_is_no_traceback(variables: dict[str, str], tmp_path: Path) -> None:
    program = (
        "from pipelib.corpus.sources.hub import HubSource; from pipelib.errors import UserError\n"
        "try: HubSource('a/b', 'a' * 40, '').identity()\n"
        "except UserError as error: print(error)"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PIPELIB_STATE_DIR": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("huggingface_hub cannot read its variables (")


# ---- Certificates and proxies ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that nobody but itself has signed, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a mirror")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "mirror.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def test_a_certificate_that_is_not_trusted_ends_at_once_and_can_be_trusted(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with FakeHub(REPO, REVISION, {FILE: parquet_bytes(text=["x"])}, certificate=certificate) as fake:
        point_at(fake.url, monkeypatch)
        with pytest.raises(UserError) as caught:
            source().identity()
        for part in (
            "the certificate of 127.0.0.1 cannot be verified: self-signed certificate",
            "set SSL_CERT_FILE to",
        ):
            assert part in str(caught.value)
        huggingface_hub.utils.close_session()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        monkeypatch.setenv("SSL_CERT_DIR", "/none")
        with pytest.raises(UserError, match=r"only SSL_CERT_DIR=/none is used now.*does not read REQUESTS_CA_BUNDLE\)"):
            source().identity()
        assert "attempt" not in capfd.readouterr().out
        huggingface_hub.utils.close_session()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert len(source().write(tmp_path / "raw", tmp_path / "work").files) == 1


def test_https_where_nobody_speaks_it_ends_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(hub.url.replace("http:", "https:"), monkeypatch)
    with pytest.raises(UserError, match=r"127\.0\.0\.1 or the proxy does not speak TLS at this port.*http://"):
        source().identity()
    assert hub.requests == []


class Proxy:
    """A proxy that answers every request with one status. Use it in a `with` block."""

    def __init__(self, status: int) -> None:
        self.asked: list[str] = []
        proxy = self

        class ThisHandler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                proxy.asked.append(self.command)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_CONNECT = do_GET = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHandler)

    @property
    def url(self) -> str:
        return f"http://user:hf_secret@127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.mark.parametrize(
    ("status", "endpoint", "message"),
    [
        (407, "https://hub.invalid", r"the proxy answers 407 .*http://USER:PASSWORD@HOST:PORT"),
        (403, "https://hub.invalid", r"the proxy answers 403 .*NO_PROXY"),
        (404, "https://hub.invalid", r"the proxy answers 404 .*NO_PROXY"),
        (407, "http://hub.invalid", r"HTTP 407 .*http://USER:PASSWORD@HOST:PORT"),
    ],
)
def test_a_proxy_that_refuses_ends_at_once(
    status: int, endpoint: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(endpoint, monkeypatch)
    with Proxy(status) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(UserError, match=message) as caught:
            source().identity()
        assert "secret" not in str(caught.value)
        assert len(proxy.asked) == 1


@pytest.mark.parametrize("status", [502, 503, 429])
def test_a_proxy_that_fails_in_passing_is_asked_again(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("https://hub.invalid", monkeypatch)
    with Proxy(status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(UserError, match=rf"in 4 attempts \(the proxy answers {status}"):
            source().identity()
        assert proxy.asked == ["CONNECT"] * 4


def test_a_proxy_that_is_not_there_is_named_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("https://hub.invalid", monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hf_secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"in 4 attempts \(no connection to the proxy http://127\.0\.0\.1:9\)"):
        source().identity()


def test_a_name_that_is_not_known_is_named_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    point_at("https://hugingface.co", monkeypatch)
    with pytest.raises(
        UserError, match=r"in 4 attempts \(the name of hugingface\.co cannot be resolved\).*HF_ENDPOINT"
    ):
        source().identity()


def test_the_identity_does_not_depend_on_who_listed(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = source().identity()
    with FakeHub(REPO, REVISION, hub.files) as mirror:
        monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "other state"))
        point_at(mirror.url, monkeypatch)
        assert HubSource(REPO, REVISION, FOLDER, retry=QUICK).identity() == first
