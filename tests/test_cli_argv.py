"""What people typed so far means what it meant: arguments, exit status and output, as of before commands were dataclasses."""

import shlex
from pathlib import Path

import pytest

from pipelib.cli.clean import Clean
from pipelib.cli.command import Command
from pipelib.cli.compare import Compare
from pipelib.cli.doctor import Doctor
from pipelib.cli.evaluate import Evaluate
from pipelib.cli.export_tokens import ExportTokens
from pipelib.cli.main import main, make_parser
from pipelib.cli.plan import Plan
from pipelib.cli.plots_page import PlotsPage
from pipelib.cli.publish import Publish
from pipelib.cli.sample import Sample
from pipelib.cli.summary import Summary
from pipelib.cli.track import Track
from pipelib.cli.verify import Verify

PARSED = [
    # as the documents and the Makefile have it
    ("doctor", Doctor()),
    ("summary", Summary()),
    ("plots-page", PlotsPage()),
    ("plan", Plan(params=Path("params.yaml"), no_measure=False, check=False)),
    ("plan --check", Plan(check=True)),
    ("plan --params presets/gpt2-124m.yaml", Plan(params=Path("presets/gpt2-124m.yaml"))),
    ("verify", Verify(folder=None, repair=False)),
    ("verify data/raw --repair", Verify(folder=Path("data/raw"), repair=True)),
    ("track", Track(runs=(), replay=False)),
    ("track --replay brave-lynx", Track(runs=("brave-lynx",), replay=True)),
    ("compare HEAD workspace", Compare(runs=("HEAD", "workspace"), md=False)),
    ("compare . ../other-clone --md", Compare(runs=(".", "../other-clone"), md=True)),
    ("clean", Clean(stage=None, older_than=0.0, yes=False, dry_run=False)),
    ("clean --stage train --older-than 7", Clean(stage="train", older_than=7.0)),
    ("clean --stage hub --yes", Clean(stage="hub", yes=True)),
    ("clean --dry-run", Clean(dry_run=True)),
    ("publish --repo NAME/gpt2 --private", Publish(repo="NAME/gpt2", private=True, licence=None, out=None)),
    ("publish --repo a/b --licence mit --out ../look", Publish(repo="a/b", licence="mit", out=Path("../look"))),
    (
        "export-tokens --format npy --out edu",
        ExportTokens(tokens=Path("data/tokens"), format="npy", out=Path("edu"), name="edufineweb"),
    ),
    (
        "evaluate --model models",
        Evaluate(model=Path("models"), tasks=None, limit=None, baselines=(), precision=None, out=None),
    ),
    (
        "evaluate --model ../gpt2 --tasks hellaswag piqa --limit 200",
        Evaluate(model=Path("../gpt2"), tasks=("hellaswag", "piqa"), limit=200),
    ),
    (
        "evaluate --model ./mine --baselines ./yours --precision bf16 --out out",
        Evaluate(model=Path("mine"), baselines=("./yours",), precision="bf16", out=Path("out")),
    ),
    (
        "sample --prompt 'Returns the'",
        Sample(
            prompt=("Returns the",),
            model=None,
            tokens=100,
            temperature=1.0,
            top_k=None,
            top_p=None,
            num_samples=1,
            seed=0,
            device=None,
        ),
    ),
    (
        "sample --prompt Parameters 'See also' --tokens 50 --temperature 0.8 --seed 3",
        Sample(prompt=("Parameters", "See also"), tokens=50, temperature=0.8, seed=3),
    ),
    (
        "sample --model ../gpt2 --prompt a --num-samples 5 --top-k 5 --top-p 0.9 --device cuda:1",
        Sample(prompt=("a",), model=Path("../gpt2"), num_samples=5, top_k=5, top_p=0.9, device="cuda:1"),
    ),
    # an option twice: the last counts; prompts add up
    ("sample --prompt The '' --prompt ''", Sample(prompt=("The", "", ""))),
    ("evaluate --model a --model m --tasks a --tasks b", Evaluate(model=Path("m"), tasks=("b",))),
    ("plan --params a --params b --check --check", Plan(params=Path("b"), check=True)),
    # no value is a value, too
    ("evaluate --model m --tasks", Evaluate(model=Path("m"), tasks=())),
    ("evaluate --model m --baselines", Evaluate(model=Path("m"), baselines=())),
    ("plan --params=", Plan(params=Path())),
    ("verify ''", Verify(folder=Path())),
    # with =, and beginnings
    ("clean --older=7 --dry", Clean(older_than=7.0, dry_run=True)),
    ("plan --pa x --c", Plan(params=Path("x"), check=True)),
    ("evaluate --m m --t a b --base gpt2", Evaluate(model=Path("m"), tasks=("a", "b"), baselines=("gpt2",))),
    ("sample --p a --tok 0 --num=2", Sample(prompt=("a",), tokens=0, num_samples=2)),
    ("sample --prompt==a", Sample(prompt=("=a",))),
    # numbers as Python reads them, also negative ones
    ("sample --prompt a --tokens 1_000 --seed -1", Sample(prompt=("a",), tokens=1000, seed=-1)),
    ("sample --prompt a --temperature .5 --top-p=1e-3", Sample(prompt=("a",), temperature=0.5, top_p=0.001)),
    ("sample --prompt a --temperature -1 --top-k -1", Sample(prompt=("a",), temperature=-1.0, top_k=-1)),
    ("clean --older-than inf", Clean(older_than=float("inf"))),
    # what other shells and libraries take for something else
    ("compare @args.txt 100% '[/red]' 'HEAD^'", Compare(runs=("@args.txt", "100%", "[/red]", "HEAD^"))),
    ("track '\udcff\udce9' 'a\nb'", Track(runs=("\udcff\udce9", "a\nb"))),
    ("track -- -x --replay", Track(runs=("-x", "--replay"))),
    ("", None),
]


@pytest.mark.parametrize(("line", "command"), PARSED, ids=[line or "nothing" for line, _ in PARSED])
def test_arguments_mean_what_they_meant(line: str, command: Command | None) -> None:
    assert make_parser().parse_command(shlex.split(line)) == command


NO_STATE, NO_RECORD = "no state to delete in {}/.pipelib\n", "no run has been recorded in {}/.pipelib/records\n"
ENDED = [
    ("clean", 0, NO_STATE),
    ("clean --stage lists --yes", 0, NO_STATE),
    ("clean --older-than 1e1 --dry-run", 0, NO_STATE),
    ("clean --older-than -1", 1, ""),
    ("clean --older-than nan", 1, ""),
    ("clean --older-than 7d", 2, ""),
    ("clean --stage tokens", 2, ""),
    ("clean train", 2, ""),
    ("track", 0, NO_RECORD),
    ("track --replay", 0, NO_RECORD),
    ("track --replay no-such-run", 1, ""),
    ("track ..", 1, ""),
    ("verify", 1, ""),
    ("verify a b", 2, ""),
    ("summary", 1, ""),
    ("plots-page", 1, ""),
    ("compare HEAD workspace", 1, ""),
    ("compare --md", 2, ""),
    ("publish --repo OWNER/NAME --out o", 1, ""),
    ("publish --private", 2, ""),
    ("export-tokens --format npy --out out --name train", 1, ""),
    ("export-tokens --format npz --out o", 2, ""),
    ("sample --prompt a --tokens 0", 1, ""),
    ("sample --prompt a --temperature 0 --num-samples 2", 1, ""),
    ("sample --prompt a --temperature -inf", 2, ""),
    ("sample --prompt a --top 5", 2, ""),
    ("sample --prompt a --num_samples 2", 2, ""),
    ("sample --prompt", 2, ""),
    ("evaluate models", 2, ""),
    ("evaluate --model m --precision fp8", 2, ""),
    ("plan params.yaml", 2, ""),
    ("plan --check=true", 2, ""),
    ("--foo plan", 2, ""),
    ("--version", 0, "pipelib 0.1.0\n"),
    ("--version plan", 0, "pipelib 0.1.0\n"),
    ("--install-completion", 2, ""),
    ("help", 2, ""),
    ("''", 2, ""),
]


@pytest.mark.parametrize(("line", "status", "said"), ENDED, ids=[line for line, _, _ in ENDED])
def test_commands_end_as_they_ended(
    line: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIPELIB_STATE_DIR", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_a")
    try:
        ended: int | str | None = main(shlex.split(line))
    except SystemExit as error:
        ended = error.code
    assert (ended, capsys.readouterr().out) == (status, said.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


TOO_LONG, NOT_UTF8 = "n" * 300, "\udcff\udce9"


@pytest.mark.parametrize(
    "name", [TOO_LONG, f"{TOO_LONG}/x", NOT_UTF8, "file/x"], ids=["long", "below", "bytes", "file"]
)
@pytest.mark.parametrize(
    "line",
    [
        "verify NAME",
        "plan --check --params NAME",
        "track NAME",
        "sample --prompt a --device cpu --model NAME",
        "export-tokens --format npy --out out --tokens NAME",
        "evaluate --model NAME",
        "compare NAME NAME",
    ],
)
def test_any_name_of_a_file_ends_in_a_message(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([word.replace("NAME", name) for word in line.split()]) == 1
    assert capfd.readouterr().err.startswith("pipelib: ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("pln", "plan instead of pln"),
        ("PLAN", "plan instead of PLAN"),
        ("eval --model m", "evaluate instead of eval"),
        ("export_tokens", "export-tokens instead of export_tokens"),
        ("--vrsion", "--version instead of --vrsion"),
        ("plan --parms x", "--params instead of --parms"),
        ("plan --Check", "--check instead of --Check"),
        ("sample --promt=x", "--prompt instead of --promt"),
        ("publish --repo a/b --license mit", "--licence instead of --license"),
        ("clean --dry_run", "--dry-run instead of --dry_run"),
        ("clean --stage", ""),  # an option without its value
        ("clean --stage nothing", ""),
        ("plan --che --foo", ""),  # a beginning that is known, and what resembles nothing
        ("clean --no-yes", ""),  # the opposite
        ("train", ""),
    ],
)
def test_a_misspelled_word_is_answered_with_the_right_one(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(typed))
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.partition(" Did you mean ")[2] == (f"{meant}?\n" if meant else "")
    assert said.err.startswith("usage: pipelib")
