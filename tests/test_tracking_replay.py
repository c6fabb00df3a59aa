"""`pipelib track`: what MLflow missed arrives later, once, whatever had arrived before."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_tracking import record_path, runs, start, write

from pipelib.cli.main import main
from pipelib.tracking.mirror import Mirror
from pipelib.tracking.mlflow_run import MlflowRun
from pipelib.tracking.mlflow_store import TrackingUri
from pipelib.tracking.record import read_events
from pipelib.tracking.replay import exclusive

pytestmark = [
    pytest.mark.usefixtures("workspace"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]
STAGES = ("download", "vocabulary", "tokenize", "train", "evaluate")


def run_pipeline(*, mlflow: bool = False, stages: tuple[str, ...] = STAGES) -> None:
    """All stages, each with numbers, files and tags; by default while MLflow is away."""
    lock = {"stages": {"train": {"outs": [{"path": "models", "md5": "22.dir"}]}}}
    write("dvc.lock", lock)
    for stage in stages:
        final = Path(stage) / "final"
        write(f"{final}/metrics/{stage}.json", {"val_loss": 3.25, "tokens": 7})
        write(f"metrics/{stage}.json", {"val_loss": 3.25, "tokens": 7})
        write(f"{final}/{'reports/evaluation.md' if stage == 'evaluate' else f'curves/{stage}.csv'}", f"of {stage}")
        write(f"{final}/models/model.safetensors", "weights")
        with start(stage, mlflow=mlflow) as run:
            for step in range(3):
                run.log({"train/loss": 4.0 - step, "system/cpu_utilization_percentage": 50.0}, step)
            run.log_text("samples.txt", "Once upon a time")
            run.log_params({"workers": 2})
            run.log_outs(final)


def contents(client: Any) -> dict[str, Any]:
    """Everything that MLflow shows of this test's runs, less its own ids and times."""
    shown = {}
    for stage in ("pipeline", *STAGES):
        found = runs(client, stage)
        assert len(found) <= 1, f"{stage} is there {len(found)} times"
        for run in found:
            tags = {
                k: v
                for k, v in run.data.tags.items()
                if k not in ("mlflow.parentRunId", "pipelib.record", "pipelib.sent")
            }
            folder = Path(run.info.artifact_uri)
            files = {
                path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
            }
            history = {
                name: sorted([p.step, p.value] for p in client.get_metric_history(run.info.run_id, name))
                for name in run.data.metrics
            }
            inputs = [[data.dataset.name, data.dataset.digest] for data in run.inputs.dataset_inputs]
            shown[stage] = [run.info.status, run.info.run_name, run.data.params, tags, history, files, inputs]
    plain: dict[str, Any] = json.loads(json.dumps(shown).replace(os.environ["DVC_EXP_NAME"], "KEY"))
    return plain


def track(*arguments: str) -> int:
    return main(["track", *arguments])


def test_what_was_replayed_is_what_would_have_been_mirrored(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pipeline(mlflow=True)
    live = contents(client)
    monkeypatch.setenv("DVC_EXP_NAME", "replayed")
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(Path("other").absolute()))
    run_pipeline()
    assert track("--replay") == 0
    replayed = contents(client)
    assert replayed["pipeline"][0] == replayed["train"][0] == "FINISHED"
    assert replayed["train"][4]["train/loss"] == [[0, 4.0], [1, 3.0], [2, 2.0]]
    assert replayed["evaluate"][5]["reports/evaluation.md"] == replayed["pipeline"][5]["reports/evaluation.md"]
    assert "22.dir" in replayed["pipeline"][5]["model/reference.json"]
    for shown in (live, replayed):
        for stage in shown:
            del shown[stage][3]["logging.mlflow"]
    assert live == replayed


def test_a_run_lasted_as_long_as_its_record_says(client: Any) -> None:
    run_pipeline(stages=("train",))
    events = read_events(record_path())[0]
    track("--replay")
    for run in (*runs(client, "train"), *runs(client, "pipeline")):
        assert run.info.start_time == round(events[0]["time"] * 1000)
        assert run.info.end_time == round(events[-1]["time"] * 1000)


def test_twice_is_once(client: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_pipeline()
    assert track("--replay") == 0
    once = contents(client)
    said = capsys.readouterr()
    assert "train: MLflow had nothing; " in said.out
    sending = [f"sending {os.environ['DVC_EXP_NAME']} {stage}" for stage in STAGES]
    assert said.err.splitlines() == [f"asking MLflow at {TrackingUri.chosen().uri}", *sending]

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError(f"nothing is to be sent, not {arguments} {named}")

    for name in ("_log", "_send_file", "_send_input", "_create"):
        monkeypatch.setattr(MlflowRun, name, refuse)
    assert track("--replay") == 0
    said = capsys.readouterr()
    assert said.out.endswith("has everything now\n")
    assert "sending" not in said.err
    assert contents(client) == once
    assert track() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:6]] == list(STAGES)
    assert all(line.endswith("finished  8       all of it") for line in lines[1:6])
    assert lines[-1].endswith("has everything that was not deleted there")


@pytest.mark.parametrize("arrived", [0, 1, 3, 5, 7])
def test_half_of_a_run_had_arrived(client: Any, monkeypatch: pytest.MonkeyPatch, arrived: int) -> None:
    """The connection broke after so many calls of sending train's record; another stage's was complete."""
    run_pipeline(stages=("train",))
    calls = [0]
    call = MlflowRun._call

    def breaking(*arguments: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] > arrived:
            raise ConnectionError("broken")
        call(*arguments, **named)

    with monkeypatch.context() as broken:
        broken.setattr(MlflowRun, "_call", breaking)
        assert track("--replay") == 1
    assert calls[0] > arrived
    assert track("--replay") == 0
    shown = contents(client)
    assert shown["train"][4]["train/loss"] == [[0, 4.0], [1, 3.0], [2, 2.0]]
    assert shown["train"][4]["train.val_loss"] == [[0, 3.25]]
    assert shown["train"][2]["workers"] == "2"
    assert shown["train"][5] == {"samples.txt": "Once upon a time", "curves/train.csv": "of train"}
    assert shown["train"][0] == shown["pipeline"][0] == "FINISHED"


def test_a_file_that_arrived_in_part_is_sent_again(client: Any, root: Path) -> None:
    run_pipeline(stages=("train",))
    track("--replay")
    (train,) = runs(client, "train")
    (file,) = (root / "mlartifacts" / train.info.run_id).rglob("samples.txt")
    file.write_text("Once")
    client.delete_tag(train.info.run_id, "pipelib.sent")
    track("--replay")
    assert file.read_text() == "Once upon a time"


def test_a_place_holder_of_a_skipped_stage_becomes_its_run(client: Any) -> None:
    """Train's record was not sent; evaluate, which was, showed it as cached."""
    run_pipeline(stages=("train",))
    record = record_path("train")
    record.rename(record.with_suffix(".away"))
    run_pipeline(mlflow=True, stages=("evaluate",))
    (holder,) = runs(client, "train")
    assert holder.data.tags["dvc.cached"] == "true"
    record.with_suffix(".away").rename(record)
    track("--replay")
    (train,) = runs(client, "train")
    assert train.info.run_id == holder.info.run_id
    assert "dvc.cached" not in train.data.tags
    shown = contents(client)["train"]
    assert shown[4]["train.val_loss"] == [[0, 3.25]]
    assert shown[4]["train/loss"] == [[0, 4.0], [1, 3.0], [2, 2.0]]


def test_what_was_deleted_stays_deleted_unless_it_is_named(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(stages=("train",))
    track("--replay")
    (first,) = runs(client, "train")
    client.delete_run(first.info.run_id)
    capsys.readouterr()
    assert track("--replay") == 0
    key = os.environ["DVC_EXP_NAME"]
    assert f"`pipelib track --replay {key}` sends them again" in capsys.readouterr().out
    assert runs(client, "train") == []
    track()
    assert "deleted there" in capsys.readouterr().out
    assert track("--replay", key) == 0
    (second,) = runs(client, "train")
    assert second.info.run_id != first.info.run_id
    assert contents(client)["train"][4]["train/loss"] == [[0, 4.0], [1, 3.0], [2, 2.0]]


def test_the_next_stage_of_a_run_sends_what_the_one_before_could_not(client: Any) -> None:
    run_pipeline(stages=("download", "vocabulary", "tokenize", "train"))
    run_pipeline(mlflow=True, stages=("evaluate",))
    shown = contents(client)
    assert shown.keys() == {"pipeline", *STAGES}
    assert shown["train"][4]["train/loss"] == [[0, 4.0], [1, 3.0], [2, 2.0]]
    assert [shown[stage][0] for stage in shown] == ["FINISHED"] * 6
    assert "dvc.cached" not in shown["train"][3]


def test_a_record_that_is_being_sent_is_left_alone(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(stages=("train",))
    with exclusive(record_path()) as mine:
        assert mine
        assert track("--replay") == 0
    said = capsys.readouterr().out
    assert "skipped, because the stage is running or another process sends it" in said
    assert said.endswith("has everything except what is being sent now\n")
    del client


def test_a_killed_stage_is_not_shown_as_running(client: Any) -> None:
    """Its last words are missing, so its record says nothing of an end; one that said so shows it."""

    def stopped() -> None:
        with start(mlflow=False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    track("--replay")
    assert runs(client, "train")[0].info.status == runs(client, "pipeline")[0].info.status == "KILLED"


def test_one_record_that_fails_keeps_no_other_from_being_sent(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(stages=("download", "train"))
    complete = MlflowRun.complete

    def failing(view: MlflowRun, events: Any) -> None:
        if view.stage == "download":
            raise ValueError("no, not this")
        complete(view, events)

    with monkeypatch.context() as broken:
        broken.setattr(MlflowRun, "complete", failing)
        assert track("--replay") == 1
    said, key = capsys.readouterr(), os.environ["DVC_EXP_NAME"]
    assert f"{key} download: could not be sent to MLflow (ValueError: no, not this)" in said.err
    assert f"did not accept all of {key} download, so" in said.err
    assert "has everything" not in said.out
    assert runs(client, "train")[0].info.status == "FINISHED"
    assert track("--replay") == 0
    assert runs(client, "download")[0].info.status == "FINISHED"


@pytest.mark.parametrize("error", [PermissionError(13, "no"), ConnectionRefusedError(111, "no"), ImportError("boto3")])
@pytest.mark.parametrize("mlflow", [True, False], ids=["live", "replayed"])
def test_a_store_that_takes_no_files_takes_everything_else(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mlflow: bool, error: Exception
) -> None:
    from mlflow import MlflowClient

    def refuse(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as refusing:
        for name in ("log_text", "log_artifact"):
            refusing.setattr(MlflowClient, name, refuse)
        run_pipeline(mlflow=mlflow, stages=("evaluate",))
        if not mlflow:
            assert track("--replay") == 1
        said = capsys.readouterr().err
        shown = contents(client)
        assert shown["evaluate"][0] == shown["pipeline"][0] == "FINISHED"
        assert shown["evaluate"][4]["train/loss"] == [[0, 4.0], [1, 3.0], [2, 2.0]]
        assert "22.dir" in shown["pipeline"][3]["mlflow.note.content"]
        assert said.count(f"MLflow refuses files ({type(error).__name__}: {error})") == 1
        track()
        assert "a part" in capsys.readouterr().out
    assert track("--replay") == 0
    assert contents(client)["evaluate"][5].keys() == {"samples.txt", "reports/evaluation.md"}


def test_a_parent_that_was_removed_for_good_is_made_again(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(stages=("train",))
    track("--replay")
    (train,), (parent,) = runs(client, "train"), runs(client, "pipeline")
    client.delete_run(parent.info.run_id)
    client._tracking_client.store._hard_delete_run(parent.info.run_id)  # what `mlflow gc` calls
    capsys.readouterr()
    assert track() == 0
    assert "a part" in capsys.readouterr().out
    assert track("--replay") == 0
    assert runs(client, "train")[0].info.run_id == train.info.run_id
    assert contents(client)["pipeline"][0] == "FINISHED"


def test_a_stages_own_run_is_sent_whatever_becomes_of_the_others(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(stages=("download", "vocabulary", "tokenize"))

    def failing(*_: object) -> None:
        raise ValueError("no, not this")

    monkeypatch.setattr(MlflowRun, "complete", failing)
    run_pipeline(mlflow=True, stages=("train",))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    for stage, line in zip(("download", "vocabulary", "tokenize"), said, strict=True):
        assert f"MLflow did not accept {stage}-ffff" in line
    (train,) = runs(client, "train")
    assert train.info.status == "FINISHED"
    assert train.data.tags["pipelib.sent"] == str(record_path().stat().st_size)


def test_a_record_with_a_torn_last_line_can_be_sent_wholly(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(stages=("train",))
    with record_path().open("a") as record:
        record.write('{"time": 1, "ev')
    assert track("--replay") == track("--replay") == 0
    assert capsys.readouterr().out.count("MLflow had ") == 1
    assert track() == 0
    assert "all of it" in capsys.readouterr().out
    del client


def test_a_file_that_is_gone_is_named(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(stages=("train",))
    Path("train/final/curves/train.csv").unlink()
    track("--replay")
    assert "curves/train.csv is no longer on this disk" in capsys.readouterr().out
    del client


def test_a_server_that_is_away_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(stages=("train",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary-pw@127.0.0.1:1")
    for arguments in ((), ("--replay",)):
        assert track(*arguments) == 1
        said = capsys.readouterr().err
        asked, said = said.split("\n", 1)
        assert asked == "asking MLflow at http://***@127.0.0.1:1"
        assert said.startswith("pipelib: MLflow at http://***@127.0.0.1:1 failed (URLError: ")
        assert "run pipelib track --replay when it works again" in said
        assert "canary" not in asked + said


def test_no_records_and_no_database(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert track() == 0
    assert "no run has been recorded in " in capsys.readouterr().out
    monkeypatch.setenv("DVC_ROOT", str(Path("elsewhere").absolute()))
    run_pipeline(stages=("train",))
    assert track() == 0
    said = capsys.readouterr().out
    assert "nothing" in said
    assert "mlflow.db does not exist yet; `pipelib track --replay` creates it" in said
    assert not Path("elsewhere").exists()
    assert track("--replay", "no-such-run") == 1
    assert "no-such-run: no run of this name is recorded" in capsys.readouterr().err


def test_a_mirror_and_a_replay_do_not_send_the_same_record(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
        mirror: Mirror | None = run._mirror
        assert mirror is not None
        while not runs_exist(client):
            mirror._closing.wait(0.01)
        track("--replay")
        assert "skipped, because the stage is running" in capsys.readouterr().out
    assert len(runs(client, "train")) == 1
    assert read_events(record_path())[0][-1]["event"] == "end"


def runs_exist(client: Any) -> bool:
    where = f"tags.`pipelib.key` = '{os.environ['DVC_EXP_NAME']}'"
    experiment = client.get_experiment_by_name("pipelib")
    return experiment is not None and bool(client.search_runs([experiment.experiment_id], where))


def test_the_address_is_the_one_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert TrackingUri.chosen() == TrackingUri("http://host", None)
