"""The record is true after every kill, MLflow becomes equal to it, and neither can stop a stage."""

import inspect
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_tracking import (
    CODE,
    FINGERPRINT,
    SEARCHED,
    FakeParams,
    Logging,
    points,
    record_path,
    runs,
    start,
    steps,
    write,
)

from pipelib.tracking import mlflow_store, system_metrics
from pipelib.tracking.mlflow_run import MlflowRun
from pipelib.tracking.page import model_reference, pipeline_page, reproduce
from pipelib.tracking.record import Record, never_fail, read_events, redact
from pipelib.tracking.run import NullRun, Run, attach_run, open_run

# MLflow 3.17 with SQLAlchemy 2.1 warns once, when it is imported.
pytestmark = [
    pytest.mark.usefixtures("workspace"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

# ---- The record ------------------------------------------------------------------------------------------------------


def test_a_resumed_run_records_no_step_twice() -> None:
    def killed() -> None:
        with start(mlflow=False) as run:
            for step in range(4):
                run.log({"train/loss": 4.0 - step, "train/lr": 0.1}, step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    with start(mlflow=False) as run:
        for step in range(2, 6):
            run.log({"train/loss": 4.0 - step}, step)
    recorded = points(record_path())
    assert recorded.count(("train/loss", 3)) == 1
    assert [step for key, step in recorded if key == "train/loss"] == [0, 1, 2, 3, 4, 5]
    ends = [event["status"] for event in read_events(record_path())[0] if event["event"] == "end"]
    assert ends == ["killed", "finished"]


@pytest.mark.parametrize("cut", [1, 12])
def test_a_line_torn_by_a_kill_is_left_out_and_harms_no_other(cut: int) -> None:
    path = Path("record.jsonl")
    record = Record(path)
    record.append_metrics({"a": 1.0}, 1)
    record.append_metrics({"a": 2.0}, 2)
    record.close()
    os.truncate(path, path.stat().st_size - cut)
    record = Record(path)
    record.append_metrics({"a": 2.0}, 2)
    record.append_metrics({"a": 3.0}, 3)
    record.close()
    assert points(path) == [("a", 1), ("a", 2), ("a", 3)]  # cut by 1, only the newline is lost, and the line counts


def test_every_line_is_json_also_for_a_loss_that_is_not_a_number() -> None:
    with start(mlflow=False) as run:
        run.log({"train/loss": float("nan"), "train/grad_norm": float("inf")}, 7)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in record_path().read_text().splitlines()]
    assert lines[1]["metrics"] == {"train/loss": "nan", "train/grad_norm": "inf"}


def test_a_final_number_is_recorded_again_only_when_it_changed() -> None:
    with start(mlflow=False) as run:
        for value in (1.0, 1.0, 2.0):
            run.log({"evaluate.acc": value})
    assert points(record_path()) == [("evaluate.acc", None)] * 2


def test_a_stage_that_is_fresh_does_not_meet_the_old_points() -> None:
    for code, is_fresh in ((CODE, True), (CODE, True), ({"stages/train.py": "bb"}, False)):
        with start(mlflow=False, code=code, is_fresh=is_fresh) as run:
            run.log({"train/loss": 1.0}, 1)
        assert points(record_path()) == [("train/loss", 1)]
    assert len(list(record_path().parent.iterdir())) == 3


def test_another_experiment_that_goes_on_with_the_state_begins_with_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(mlflow=False) as run:
        run.log({"train/loss": 1.0}, 1)
    monkeypatch.setenv("DVC_EXP_NAME", "other")
    with start(mlflow=False) as run:
        run.log({"train/loss": 1.0}, 1)
        run.log({"train/loss": 0.5}, 2)
    assert points(record_path()) == [("train/loss", 1), ("train/loss", 2)]


def test_without_an_experiment_name_the_key_follows_params_but_not_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_EXP_NAME")
    for params in (
        FakeParams(logging=Logging(1, False)),
        FakeParams(logging=Logging(2, False)),
        FakeParams(train={"max_lr": 1.0}, logging=Logging(1, False)),
    ):
        with open_run("download", params, FINGERPRINT, CODE):  # type: ignore[arg-type]
            pass
    assert len(list(Path("state/records").iterdir())) == 2


def test_a_record_that_cannot_be_written_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("state").write_text("a file where a folder should be")
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
    assert isinstance(run, NullRun)
    assert "this run is not recorded; the stage continues" in capsys.readouterr().err


def test_a_dvc_lock_that_nobody_can_read_costs_its_digests(capsys: pytest.CaptureFixture[str]) -> None:
    write("dvc.lock", "<<<<<<< HEAD")
    with start("evaluate", mlflow=False) as run:
        run.log({"a": 1.0}, 1)
    assert "so DVC's digests are not recorded; the stage continues" in capsys.readouterr().err
    assert [event["event"] for event in read_events(record_path("evaluate"))[0]] == [
        "open",
        "metrics",
        "summary",
        "end",
    ]


def test_a_repository_that_git_refuses_costs_the_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch, for its tests
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    with start("evaluate", mlflow=False):
        pass
    said = capsys.readouterr().err
    assert "dubious ownership" in said
    assert "so the commit of this run is not recorded; the stage continues" in said
    (opened,) = (event for event in read_events(record_path("evaluate"))[0] if event["event"] == "open")
    assert not [tag for tag in opened["tags"] if tag.startswith("git.")], "unknown is not clean"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_state_of_the_machine_is_recorded_beside_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "SAMPLE_SECONDS", 0.01)
    with start(mlflow=False):
        while ("system/system_memory_usage_percentage", 2) not in points(record_path()):
            pass
    names = [name for name, _ in points(record_path())]
    assert "system/cpu_utilization_percentage" in names


def test_nothing_is_appended_once_a_record_is_closed() -> None:
    record = Record(Path("record.jsonl"))
    record.append_metrics({"a": 1.0}, 1)
    record.close()
    with Path("another").open("x"), pytest.raises(OSError, match="Bad file descriptor"):  # it may have the number now
        record.append_metrics({"a": 2.0}, 2)
    assert points(Path("record.jsonl")) == [("a", 1)]
    assert Path("another").read_bytes() == b""


def test_null_run_has_every_method_of_run_and_writes_nothing(workspace: Path) -> None:
    for name, method in inspect.getmembers(Run, inspect.isfunction):
        if not name.startswith("_"):
            assert getattr(NullRun, name) is not method
            assert inspect.signature(getattr(NullRun, name)) == inspect.signature(method)
    with NullRun() as run:
        run.log({"a": 1.0}, 1)
        run.log_text("a", "b")
        run.log_params({"a": 1})
        run.log_outs(workspace)
    assert list(workspace.iterdir()) == []


def test_the_module_needs_neither_torch_nor_mlflow() -> None:
    check = "import sys, pipelib.tracking.run; print(*{'torch', 'mlflow', 'numpy', 'pandas'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": SEARCHED}
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "\n"


# ---- MLflow ----------------------------------------------------------------------------------------------------------


def test_a_whole_pipeline_in_mlflow(client: Any, root: Path) -> None:
    """Download, vocabulary and tokenize were cached; train and evaluate ran."""
    for stage, result in (
        ("download", {"documents": 5}), ("vocabulary", {"size": 300}), ("tokenize", {"tokens": 70}),
        ("train", {"val_loss": 3.25}),
    ):  # fmt: skip
        write(f"metrics/{stage}.json", {**result, "note": "text", "yes": True})
    write("data/tokens/manifest.json", {"shards": []})
    outs = {"tokenize": ("data/tokens", "11.dir"), "train": ("models", "22.dir")}
    lock = {"stages": {stage: {"outs": [{"path": path, "md5": md5}]} for stage, (path, md5) in outs.items()}}
    write("dvc.lock", lock)
    for name, content in (
        ("train/final/metrics/train.json", {"val_loss": 3.25}),
        ("train/final/metrics/speed/train.json", {"seconds": 9}),
        ("train/final/curves/loss.csv", "step,loss\n1,4.0\n"),
        ("train/final/models/model.safetensors", "weights"),
        ("evaluate/final/metrics/evaluate.json", {"hellaswag": {"acc,none": 0.28}}),
        ("metrics/evaluate.json", {"hellaswag": {"acc,none": 0.28}}),
    ):
        write(name, content)
    with start("train") as run:
        run.log({"train/loss": 4.0}, 1)
        run.log_text("samples/step-1.txt", "Once upon a time")
        run.log_outs(Path("train/final"))
    with start("evaluate") as run:
        run.log_outs(Path("evaluate/final"))

    (parent,), (train,), (evaluate,) = (runs(client, stage) for stage in ("pipeline", "train", "evaluate"))
    assert parent.info.status == train.info.status == evaluate.info.status == "FINISHED"
    finals = {
        "download.documents": 5,
        "vocabulary.size": 300,
        "tokenize.tokens": 70,
        "train.val_loss": 3.25,
        "evaluate.hellaswag.acc_none": 0.28,
    }
    assert parent.data.metrics == finals
    assert train.data.metrics == {"train/loss": 4.0, "train.val_loss": 3.25, "speed.train.seconds": 9}
    assert parent.data.params["train.max_lr"] == "0.0018"
    assert parent.data.params["evaluate.tasks"] == '["a", "b"]'
    assert train.data.params == {"model.n_layer": "2", "train.max_lr": "0.0018", "train.compile": "false"}
    for stage in ("download", "vocabulary", "tokenize"):
        (cached,) = runs(client, stage)
        assert cached.data.tags["dvc.cached"] == "true"
        assert cached.info.status == "FINISHED"
        assert len(cached.data.metrics) == 1
    assert "dvc.cached" not in train.data.tags
    assert train.data.tags["dvc.md5.data/tokens"] == "11.dir"
    assert train.data.tags["dvc.md5.models"] == parent.data.tags["dvc.md5.models"] == "22.dir"
    assert train.data.tags["out.models"].endswith("1 files, 7 bytes")
    (data,) = train.inputs.dataset_inputs
    assert train.data.tags["data.fingerprint"].startswith(data.dataset.digest)
    assert "dvc exp apply" in train.data.tags["mlflow.note.content"]
    curve = Path(client.download_artifacts(train.info.run_id, "curves/loss.csv", str(root)))
    assert curve.read_text() == "step,loss\n1,4.0\n"
    assert client.list_artifacts(train.info.run_id, "samples")[0].path == "samples/step-1.txt"

    with start("evaluate") as run:  # the same again changes nothing
        run.log_outs(Path("evaluate/final"))
    assert len(runs(client, "evaluate")) == len(runs(client, "download")) == 1
    assert [steps(client, runs(client, "pipeline")[0], key) for key in sorted(finals)] == [[0]] * 5


def test_a_running_stages_own_lock_entry_is_never_asked(client: Any) -> None:
    write("dvc.lock", {"stages": {"train": {"outs": [{"path": "models", "md5": "stale"}]}}})
    with start("train"):
        pass
    assert not any("models" in tag for tag in runs(client, "train")[0].data.tags)


def test_after_a_kill_the_same_run_goes_on_and_has_every_step_once(client: Any) -> None:
    with start() as run:
        run.log({"train/loss": 4.0}, 1)
        run.log_text("samples/1.txt", "one")
    (first,) = runs(client, "train")
    with start(mlflow=False) as run:  # as if killed before the mirror looked
        run.log({"train/loss": 3.0}, 2)
    with start() as run:
        run.log({"train/loss": 3.0}, 2)
        run.log({"train/loss": 2.0}, 3)
    (second,) = runs(client, "train")
    assert second.info.run_id == first.info.run_id
    assert steps(client, second, "train/loss") == [1, 2, 3]
    assert second.info.status == "FINISHED"


def test_what_mlflow_has_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as run:
        run.log({"train/loss": 4.0}, 1)
        run.log_text("samples/1.txt", "one")
    sent: list[object] = []
    log, file = MlflowRun._log, MlflowRun._call
    monkeypatch.setattr(MlflowRun, "_log", lambda *a, **k: (sent.extend(k.get("points") or ()), log(*a, **k)))
    monkeypatch.setattr(
        MlflowRun,
        "_call",
        lambda *a, **k: (sent.extend(a[3:] if a[2].__name__ == "log_text" else ()), file(*a, **k)),
    )
    with start():
        pass
    assert sent == []
    with start() as run:
        run.log({"train/loss": 3.0}, 2)
    assert [point[:2] for point in sent] == [("train/loss", 2)]  # type: ignore[index]


def test_the_points_of_a_second_handle_are_mirrored_once_by_the_first(client: Any) -> None:
    with start() as launcher:
        with attach_run("train", launcher.path) as rank_0:
            rank_0.log({"train/loss": 4.0}, 1)
        launcher.log({"train.val_loss": 3.0})
    assert [event["event"] for event in read_events(record_path())[0]] == ["open", "metrics", "metrics", "end"]
    (train,) = runs(client, "train")
    assert steps(client, train, "train/loss") == [1]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (OSError, "FAILED")]
)
def test_how_a_run_ended(client: Any, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), start():
        raise error
    assert runs(client, "train")[0].info.status == runs(client, "pipeline")[0].info.status == status


def test_what_mlflow_refuses_is_said_and_the_rest_goes_on(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with start() as run:
        run.log_params({"workers": 2})
        run.log_params({"workers": 3})
        run.log({"train/loss": 1.0}, 1)
    (train,) = runs(client, "train")
    assert train.data.params["workers"] == "2"
    assert train.data.metrics == {"train/loss": 1.0}
    assert "MLflow refuses a part" in capsys.readouterr().err


def test_plain_mlflow_in_the_repository_shows_the_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow ui` asks the same function for its default database."""
    from mlflow.tracking._tracking_service import utils

    with start() as run:
        run.log_text("a.txt", "b")
    monkeypatch.chdir(root)
    assert utils._get_default_tracking_uri() == "sqlite:///mlflow.db"
    assert (root / "mlflow.db").exists()
    assert list((root / "mlartifacts").rglob("a.txt"))


ODD_NAMES = ["what?", "100%", "x%41y%3Fz", "?mode=memory", "a b#c;d&e=f+g", "ü'日\"`"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_repository_of_any_name_has_its_runs_in_its_own_database(
    name: str, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    root = tmp_path / "folder" / name
    root.mkdir(parents=True)
    shutil.copy(empty_database, root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    with start() as run:
        run.log({"train/loss": 1.5}, 1)
        run.log_text("samples/a.txt", "text")
    assert capsys.readouterr().err == ""
    assert [path.name for path in root.parent.iterdir()] == [name]
    assert sorted(path.name for path in root.iterdir()) == ["mlartifacts", "mlflow.db"]
    monkeypatch.chdir(root)
    default = f"sqlite:///{'./' * ODD_NAMES.index(name)}mlflow.db"  # of `mlflow ui`; MLflow keeps each one open
    (train,) = runs(MlflowClient(default), "train")
    assert train.data.metrics["train/loss"] == 1.5
    (kept,) = root.rglob("samples/a.txt")
    got = MlflowClient(default).download_artifacts(train.info.run_id, "samples/a.txt")
    assert Path(got).read_text() == kept.read_text() == "text"


def test_a_database_is_made_in_a_repository_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "folder" / "what? 100%41"
    root.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(root))
    store = mlflow_store.TrackingUri.chosen().open()
    assert store.client.get_experiment(store.experiment).name == "pipelib"
    assert [path.name for path in root.parent.iterdir()] == [root.name]
    assert [path.name for path in root.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize("name", ["plain", *ODD_NAMES])
def test_a_locked_database_is_found_under_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / name).mkdir(parents=True)
    database = tmp_path / "a" / name / "mlflow.db"
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(mlflow_store, "LOCK_SECONDS", 0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        mlflow_store._require_writable(mlflow_store.sqlite_uri(database))
    holder.close()
    mlflow_store._require_writable(mlflow_store.sqlite_uri(database))


def test_a_database_appears_whole_or_not_at_all() -> None:
    database = Path("mlflow.db")

    def killed(fresh: Path) -> None:
        fresh.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlflow_store._make_whole(database, killed)
    assert not database.exists()
    mlflow_store._make_whole(database, lambda fresh: fresh.open("x").close())  # meets nothing of the half-made one
    assert [path.name for path in Path().iterdir()] == ["mlflow.db"]


def test_processes_that_find_no_database_make_one_together(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(".mlflow.db.tmp").write_text("left by a kill")
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    mlflow_store.prepare_mlflow()
    from mlflow import MlflowClient  # which takes seconds, and both processes have then

    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=log_a_number, args=(stage,)) for stage in ("download", "tokenize")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert capfd.readouterr().err == ""
    assert not Path(".mlflow.db.tmp").exists()
    made = MlflowClient(f"sqlite:///{workspace}/mlflow.db")
    assert len(runs(made, "download")) == len(runs(made, "tokenize")) == 1


def log_a_number(stage: str) -> None:
    with start(stage) as run:
        run.log({"x": 1.0}, 1)


# ---- Secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_reach_neither_record_nor_mlflow(
    client: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    url = "https://someone:canary-pass@host.example/x?access_token=canary-query"
    write("train/final/reports/report.md", f"made with canary-token from {url}")
    with start() as run:
        run.log_params({"url": url, "nested": {"canary-token": ["canary-token"]}})
        run.log_params({"url": "another"})  # refused by MLflow, which quotes the old value
        run.log_text("a.txt", f"canary-token {url} hf_abcdefghijklmnopqrstuvwxyz")
        run.log({"canary-token": 1.0}, 1)
        run.log_outs(Path("train/final"))
        run.log_outs(Path("canary-token"))
        run.log({"canary-token": "no number"}, 2)  # type: ignore[dict-item]
    said = capfd.readouterr()
    assert "refuses" in said.err
    (train,) = runs(client, "train")
    files = [path.read_bytes() for path in (root / "mlartifacts" / train.info.run_id).rglob("*.*")]
    assert len(files) == 2
    for text in (
        record_path().read_bytes(),
        *files,
        str(train.to_dictionary()).encode(),
        (said.out + said.err).encode(),
    ):
        assert b"canary" not in text
        assert b"hf_abc" not in text
    assert train.data.params["url"] == "https://***@host.example/x?access_token=***"


def test_credentials_of_git_and_dvc_reach_nothing(
    client: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In URLs of remotes, in DVC's settings, in a file that is not committed, in the address of MLflow."""

    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init", "--quiet")
    write(".gitignore", "/state/\n")
    write(".dvc/config", "[core]\n")
    write("notes.txt", "one\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    git("remote", "add", "origin", "https://someone:canary-git@host.example/x.git")
    write(
        ".dvc/config",
        "['remote \"r\"']\n    url = https://someone:canary-dvc@host.example\n    password = canary-word\n",
    )
    write("notes.txt", "one\nsee https://someone:canary-url@host.example and password: canary-assigned\n")
    write("dvc.lock", {"stages": {"train": {"outs": [{"path": "models", "md5": "22.dir"}]}}})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    for stage in ("train", "evaluate"):
        with start(stage) as run:
            run.log_outs(Path("none"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:canary-pw@127.0.0.1:1")
    with start():
        pass
    said = capfd.readouterr()
    assert "http://***@127.0.0.1:1 failed" in said.err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (train,), (parent,) = runs(client, "train"), runs(client, "pipeline")
    assert train.data.tags["git.dirty"] == "true"
    diff = Path(client.download_artifacts(train.info.run_id, "uncommitted.diff")).read_text()
    assert "+see https://***@host.example and password: ***" in diff
    assert "DVC md5 `22.dir`" in parent.data.tags["mlflow.note.content"]
    searched = [path.read_bytes() for folder in (root, Path("state")) for path in folder.rglob("*") if path.is_file()]
    assert len(searched) > 5
    for text in (*searched, (said.out + said.err).encode()):
        assert b"canary-" not in text


def test_a_page_says_how_to_get_at_changes_that_are_in_no_commit() -> None:
    lineage = {"git.commit": "abc", "git.dirty": "true", "dvc.exp_name": "", "dvc.exp_baseline_rev": ""}
    page = reproduce(lineage)
    assert "    git checkout abc\n    git apply uncommitted.diff\n    dvc repro\n" in page
    assert "`uncommitted.diff` is among the artifacts of each stage" in page
    assert "    git checkout abc\n    dvc repro\n" in reproduce({**lineage, "git.dirty": "false"})
    in_experiment = reproduce({**lineage, "dvc.exp_name": "brave-lynx", "dvc.exp_baseline_rev": "def"})
    assert "    git checkout def\n    dvc exp apply brave-lynx\n    dvc repro\n" in in_experiment
    assert "uncommitted" not in in_experiment


def test_a_model_is_checked_out_only_where_its_lock_is_known() -> None:
    """The commit of a plain `dvc repro` is from before the run wrote dvc.lock: it names another model."""

    def get_it(lineage: dict[str, str]) -> tuple[list[str], str]:
        return json.loads(model_reference("22.dir", lineage))["get_it"], pipeline_page({}, lineage, "22.dir", "", {})

    lineage = {"git.commit": "abc", "git.dirty": "true", "dvc.exp_name": "", "dvc.exp_baseline_rev": ""}
    commands, page = get_it(lineage)
    assert commands == ["git checkout abc", "git apply uncommitted.diff", "dvc repro"]
    assert "dvc checkout" not in page
    assert "dvc pull" not in page
    assert get_it({**lineage, "git.dirty": "false"})[0] == ["git checkout abc", "dvc repro"]
    commands, page = get_it({**lineage, "dvc.exp_name": "brave-lynx", "dvc.exp_baseline_rev": "def"})
    assert commands == ["git checkout def", "dvc exp apply brave-lynx", "dvc checkout models", "dvc pull models"]
    assert "after `dvc exp apply`, `dvc checkout models`" in page


def test_what_stages_write_makes_no_run_dirty() -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    write("dvc.lock", {})
    write("metrics/train.json", "{}")
    write(".gitignore", "/state/\n")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*command, *arguments], check=True, capture_output=True)
    write("dvc.lock", {"stages": {}})
    write("metrics/train.json", '{"val_loss": 1}')
    with start(mlflow=False):
        pass
    (opened,) = [event for event in read_events(record_path())[0] if event["event"] == "open"]
    assert opened["tags"]["git.dirty"] == "false"
    write("new.py", "")
    with start(mlflow=False):
        pass
    events = read_events(record_path())[0]
    assert [event["tags"]["git.dirty"] for event in events if event["event"] == "open"] == ["false", "true"]
    (diff,) = [event["text"] for event in events if event["event"] == "text"]
    assert diff == "# new, and not in this diff: new.py\n"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://u:p@ss@db/x", "postgresql://***@db/x"),
        ("see https://host.example/a?page=2", "see https://host.example/a?page=2"),
        ("mail someone@host.example", "mail someone@host.example"),
        ("?X-Amz-Signature=abc&x=1", "?X-Amz-Signature=***&x=1"),
        ("tokenize.shard_tokens=100", "tokenize.shard_tokens=100"),
        ("secret_access_key = abc", "secret_access_key = ***"),
        ('"password": "a b", 1', '"password": ***, 1'),
        ("ssh://user:pa/ss@host/x", "ssh://***@host/x"),
        ("ssh://user:p@/ss@host/x and a@b", "ssh://***@host/x and a@b"),
        ("http://host:8080/~a@b/c", "http://host:8080/~a@b/c"),
        (
            "https://x.blob.core.windows.net/c?sv=1&sig=a%2Bb&se=2",
            "https://x.blob.core.windows.net/c?sv=1&sig=***&se=2",
        ),
        ("https://host/?design=new&pwd=abc", "https://host/?design=new&pwd=***"),
        ("mssql://?odbc_connect=UID%3Dsa%3BPWD%3Da%40b%3BX%3D1", "mssql://?odbc_connect=UID%3Dsa%3BPWD%3D***%3BX%3D1"),
        ("Driver=x;UID=sa;PWD=abc;Port=1", "Driver=x;UID=sa;PWD=***;Port=1"),
        ("client_secret: abc", "client_secret: ***"),
        ('sas_token = "?sv=1"', "sas_token = ***"),
        ("export API_TOKEN=abc dvc push", "export API_TOKEN=*** dvc push"),
        ("TOKEN=abc", "TOKEN=***"),
        ("the end token: 50256, its sign = 1", "the end token: 50256, its sign = 1"),
        ("EOT_TOKEN_ID = 50256; eot_token=7; key=value", "EOT_TOKEN_ID = 50256; eot_token=7; key=value"),
        ("a password is a secret, pwd prints a folder", "a password is a secret, pwd prints a folder"),
        (
            "at 12:30 see http://localhost:5000 or http://[::1]:5000/",
            "at 12:30 see http://localhost:5000 or http://[::1]:5000/",
        ),
    ],
)
def test_redact(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_redact_knows_the_values_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGPASSWORD", "MYSQL_PWD", "HF_TOKEN"):
        monkeypatch.setenv(name, f"canary-{name}")
        assert redact(f"said canary-{name} here") == "said *** here"
    monkeypatch.setenv("PWD", "/home/someone")
    assert redact("cannot open /home/someone/x") == "cannot open /home/someone/x"


def test_redact_knows_the_decoded_password_of_the_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:can%2Fary-pw@host")
    assert redact("login with can/ary-pw or can%2Fary-pw refused") == "login with *** or *** refused"


def test_a_long_secret_is_not_cut_before_it_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(f"cannot open postgresql://user:{'canary' * 25}@host/x: {'word ' * 30}gone")
    with never_fail("nothing is"):
        raise error
    said = capsys.readouterr().err + mlflow_store.failure(error)
    assert "canary" not in said
    assert said.count("postgresql://***@host/x") == 2


@pytest.mark.parametrize("uri", ["http://[half", "http://user:canary/pw@host", "http://user:c/p@host"])
def test_redact_knows_addresses_that_are_none(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    clean = redact(f"cannot open {uri}")
    assert "/p" not in clean
    assert "canary" not in clean
