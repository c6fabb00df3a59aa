"""Muon: the update is torch's and the paper's, each role has its rate, and a group that diverges is named."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_params import ROTARY, train_params, write_params
from small_run import new_model, small_trainer, train_small, write_tokens
from small_vocabulary import TOKENIZER
from torch import Tensor, nn

from pipelib.errors import UserError
from pipelib.model.decoder import Decoder, build
from pipelib.model.params import family_params
from pipelib.params import load_params
from pipelib.schema import ParamsError
from pipelib.training.memory import Footprint
from pipelib.training.optim.muon import Muon, orthogonalised
from pipelib.training.params import MuonParams, TrainParams
from pipelib.training.roles import EMBEDDING, HEAD, MATRICES, VECTORS, roles_of

MUON = MuonParams(momentum=0.9, weight_decay=0.5, embedding_lr=0.01, head_lr=0.001, vector_lr=0.1)
SHAPE = {key: value for key, value in ROTARY.items() if key not in ("init_from", "tie_word_embeddings")}
FAMILIES = ("gpt2", "llama", "qwen3", "arcee")


def muon_params(**changes: Any) -> TrainParams:
    return train_params(**{"optimizer": "muon", "muon": MUON, "max_lr": 0.02, "min_lr": 0.0, **changes})


def model_of(family: str, *, tied: bool = True) -> Decoder:
    if family == "gpt2":
        return new_model()
    model = build(family_params(family)(**SHAPE, tie_word_embeddings=tied), TOKENIZER.size)
    model.initialise(7)
    return model


def with_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# ---- The update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (128, 512)])
def test_in_bf16_a_matrix_is_orthogonalised_as_torch_does_it(shape: tuple[int, int]) -> None:
    torch_muon = pytest.importorskip("torch.optim._muon")
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator)
    matrices[2] = 0.0
    ours = orthogonalised(matrices.bfloat16())
    for matrix, mine in zip(matrices, ours, strict=True):
        theirs = torch_muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert torch.equal(mine, theirs)


def plain_update(gradient: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """Muon as its authors describe it, one matrix at a time, in the precision of the gradient."""
    momentum += (1 - beta) * (gradient - momentum)
    x = (1 - beta) * gradient + beta * momentum
    x = x / torch.linalg.matrix_norm(x)
    for _ in range(5):
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        else:
            gram = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
    return x * max(1.0, gradient.shape[0] / gradient.shape[1]) ** 0.5


def test_three_steps_are_those_of_a_plain_implementation() -> None:
    """GPT-2's query, key and value lie in one matrix, and each is orthogonalised by itself."""
    model = new_model()
    optimizer = Muon(model, muon_params())
    expected = {name: parameter.detach().double() for name, parameter in roles_of(model)[MATRICES].items()}
    momenta = {name: torch.zeros_like(matrix) for name, matrix in expected.items()}
    for number in range(3):
        with_gradients(model, number)
        for name, parameter in roles_of(model)[MATRICES].items():
            assert parameter.grad is not None
            parts = 3 if "c_attn" in name else 1
            pairs = zip(parameter.grad.double().chunk(parts), momenta[name].chunk(parts), strict=True)
            update = torch.cat([plain_update(gradient, momentum, 0.9) for gradient, momentum in pairs])
            rate = 0.01 * (number + 1)
            expected[name] = expected[name] * (1 - rate * 0.5) - rate * update
        optimizer.step(0.01 * (number + 1), torch.tensor(True))
    for name, parameter in roles_of(model)[MATRICES].items():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=1e-5)


def test_three_steps_are_those_of_torchs_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, which GPUs compute in: momentum, Nesterov, decay and the scale of tall matrices."""
    monkeypatch.setattr("pipelib.training.optim.muon.precision", lambda _: torch.bfloat16)
    model = model_of("arcee")
    twin = copy.deepcopy(model)
    ours = Muon(model, muon_params())
    theirs = torch.optim.Muon(
        roles_of(twin)[MATRICES].values(), lr=0.02, momentum=0.9, weight_decay=0.5, ns_coefficients=(3.4445, -4.7750, 2.0315)
    )  # fmt: skip
    for number in range(3):
        with_gradients(model, number)
        with_gradients(twin, number)
        ours.step(0.02, torch.tensor(True))
        theirs.step()
    for mine, other in zip(roles_of(model)[MATRICES].values(), roles_of(twin)[MATRICES].values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


# ---- Roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_role(family: str, tied: bool) -> None:
    model = model_of(family, tied=tied)
    roles = roles_of(model)
    names = [name for parameters in roles.values() for name in parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert set(roles[EMBEDDING]) == ({"wte.weight", "wpe.weight"} if family == "gpt2" else {"embed_tokens.weight"})
    assert (HEAD in roles) == (not tied and family != "gpt2")
    assert all(parameter.dim() == 1 for parameter in roles[VECTORS].values())
    assert all(name.startswith(("h.", "layers.")) for name in roles[MATRICES])


def test_each_role_has_its_rate() -> None:
    """With AdamW the first update of every number is the rate, whatever the gradient."""
    model = model_of("qwen3", tied=False)
    before = copy.deepcopy(model.state_dict())
    optimizer = Muon(model, muon_params(weight_decay=0.0, eps=1e-12))
    with_gradients(model, 1)
    optimizer.step(0.01, torch.tensor(True))  # half of max_lr
    for role, rate in ((EMBEDDING, 0.005), (HEAD, 0.0005), (VECTORS, 0.05)):
        for name, parameter in roles_of(model)[role].items():
            moved = (parameter - before[name]).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-7)


def test_memory_counts_one_number_for_a_matrix() -> None:
    params = family_params("qwen3")(**SHAPE, tie_word_embeddings=False)
    model, size = model_of("qwen3", tied=False), TOKENIZER.size
    with_gradients(model, 1)
    optimizer = Muon(model, muon_params())
    optimizer.step(0.01, torch.tensor(True))
    state = optimizer.state_dict()
    kept = sum(momentum.numel() for momentum in state["momenta"])
    kept += sum(tensor.numel() for tensors in state["state"].values() for tensor in tensors.values() if tensor.dim())
    footprint = Footprint(params, size, muon_params())
    assert footprint.memory(1).moments == 4 * kept
    assert footprint.checkpoint == 4 * (kept + sum(parameter.numel() for parameter in model.parameters()))


# ---- In a training ---------------------------------------------------------------------------------------------------


def test_a_training_shows_the_size_of_updates(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    train_small(tmp_path, muon_params(max_tokens=1280))
    lines = (tmp_path / "work" / "update_sizes.csv").read_text().splitlines()
    assert lines[0] == "step,tokens,matrices,embedding,head,vectors"
    assert [line.split(",")[0] for line in lines[1:]] == ["10", "20"]
    step, tokens, matrices, embedding, head, vectors = lines[1].split(",")
    assert (step, tokens, head) == ("10", "640", ""), "GPT-2 has no output layer of its own"
    assert all(1e-4 < float(size) < 2 for size in (matrices, embedding, vectors))


@pytest.mark.parametrize(
    ("key", "role"),
    [("embedding_lr", "embedding"), ("vector_lr", "vectors"), ("head_lr", "head"), ("max_lr", "matrices")],
)
def test_a_rate_at_which_a_role_diverges_is_named(tmp_path: Path, key: str, role: str) -> None:
    """The others have rates as in the presets: an embedding's weights grow a hundred times in a healthy training."""
    write_tokens(tmp_path / "tokens")
    muon = {"embedding_lr": 0.7, "head_lr": 0.004, "vector_lr": 0.015, "momentum": 0.9, "weight_decay": 0.0}
    rates = {"max_lr": 0.02, **({"max_lr": 1e25} if key == "max_lr" else {})}
    params = muon_params(muon=MuonParams(**{**muon, **({key: 1e25} if key in muon else {})}), warmup_steps=0, **rates)
    shape = family_params("llama")(**SHAPE, tie_word_embeddings=False)  # no norm between queries and softmax
    trainer = small_trainer(tmp_path, params, shape=shape)
    with pytest.raises(UserError, match=rf"weights of role {role} have grown most .* Lower train\.(muon\.)?{key} or "):
        trainer.run()


def test_a_rollback_to_before_the_first_step_forgets_the_momentum() -> None:
    model = new_model()
    optimizer = Muon(model, muon_params())
    before = copy.deepcopy(optimizer.state_dict())
    with_gradients(model, 1)
    optimizer.step(0.01, torch.tensor(True))
    assert optimizer.state_dict()["momenta"]
    optimizer.load_state_dict(before)
    assert optimizer.state_dict() == before


# ---- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__optimizer": "muon"},
            r"train\.optimizer: muon has rates .* `-S train\.optimizer=muon -S train\.max_lr=0\.02 -S 'train\.muon=",
        ),
        ({"train__muon": vars(MUON)}, r"train\.muon: its keys would be ignored, since the optimizer is adamw; set"),
        ({"train__muon": {"lr": 1}}, r"train\.muon\.lr is not a parameter.*\n.*train\.muon\.momentum is missing"),
        (
            {"train__optimizer": "muon", "train__muon": {**vars(MUON), "momentum": 1.0}},
            r"train\.muon\.momentum: 1\.0 must be at most",
        ),
    ],
)
def test_keys_that_do_not_fit_the_optimizer_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_params(tmp_path, **changes)
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")
