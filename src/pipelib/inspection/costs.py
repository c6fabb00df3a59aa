"""Estimate what a run costs: parameters, steps, tokens, FLOPs, disk, memory and time, as lines of (name, text)."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Self

from pipelib.errors import UserError, tell
from pipelib.files import format_bytes, nearest_folder, plural
from pipelib.inspection.disk import Corpus, disk_of, manifest_of
from pipelib.inspection.speed import measure_speed
from pipelib.model.device import pick_device, total_memory
from pipelib.params import Params
from pipelib.progress import format_seconds
from pipelib.training.batches import check_shares, fit_tokens
from pipelib.training.hardware import Peak, known_gpus, known_peak
from pipelib.training.launch.machines import Machines
from pipelib.training.memory import USABLE, Footprint
from pipelib.vocabulary.planned import planned_size
from pipelib.workspace.places import state_root

ASSUMED_MFU = 0.4
"""Of the peak, for machines that are not here."""


def costs(params: Params, corpus: Corpus | None, machines: Machines) -> Iterator[tuple[str, str]]:
    """All costs except the time, each line as soon as it is computed.

    Args:
        params: with a number for `micro_batch_size`; see `with_micro_batch`.
        corpus: None if its size is unknown.
    """
    yield from _model_and_steps(params, machines.world_size)
    yield from _data(params, corpus)
    yield from _disk(params, corpus)
    yield from _memory(params, machines)


def with_micro_batch(params: Params, machines: Machines) -> Params:
    """Replace `micro_batch_size: auto` by the number of rows that fit the memory that is free here now."""
    if params.train.micro_batch_size != "auto":
        return params
    check_shares(params.train, machines.world_size)
    footprint, local_ranks = _footprint(params, machines), machines.local_ranks
    free = footprint.free_per_rank(pick_device(local_world_size=local_ranks), local_ranks)
    rows = footprint.rows_that_fit(free) or 1
    return replace(params, train=replace(params.train, micro_batch_size=rows))


def within_epochs(params: Params, corpus: Corpus | None) -> Params:
    """Lower `train.max_tokens` to what `train.max_epochs` allows, as the stage does. Too short a corpus changes nothing."""
    if corpus is None:
        return params
    with suppress(UserError):  # `checks` says what is wrong
        manifest = manifest_of(corpus, params.tokenize.shard_size(corpus.tokens))
        return replace(params, train=fit_tokens(params.train, manifest, tell))
    return params


def _footprint(params: Params, machines: Machines) -> Footprint:
    return Footprint(params.model, planned_size(params.vocabulary), params.train, machines.world_size)


def _model_and_steps(params: Params, ranks: int) -> Iterator[tuple[str, str]]:
    train = params.train
    yield from _training(params)
    micro_steps = train.rows_per_step / (train.micro_batch_rows(ranks) * ranks)
    yield (
        "each step",
        f"{plural(micro_steps, 'micro-step')} a rank, of {plural(train.micro_batch_rows(ranks), 'row')} of "
        f"{train.sequence_length:,} tokens",
    )


def _training(params: Params) -> Iterator[tuple[str, str]]:
    """What is the same on every machine."""
    model, train, vocab_size = params.model, params.train, planned_size(params.vocabulary)
    yield "model", f"{model.title}, {model.parameters(vocab_size):,} parameters: {model.description}"
    tokens = train.max_steps * train.global_batch_tokens
    yield "steps", f"{train.max_steps:,} of {train.global_batch_tokens:,} tokens = {tokens:,} tokens"
    flops = model.flops_per_token(vocab_size, train.sequence_length)
    yield "compute", f"{_scaled(flops)}FLOP a token, {_scaled(flops * tokens)}FLOP in total, forward and backward"


def _scaled(number: float) -> str:
    """Format with a metric prefix: 854.7 M, 8.55 E."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000:
            return f"{number:.4g} {prefix}"
        number /= 1000
    return f"{number:.4g} Z"


def _data(params: Params, corpus: Corpus | None) -> Iterator[tuple[str, str]]:
    if corpus is None:
        yield "data", "unknown until tokenize has run, which counts the tokens of your text"
        return
    train_tokens = max(0, corpus.tokens - params.tokenize.shard_size(corpus.tokens))
    yield "data", f"{corpus.tokens:,} tokens ({corpus.origin})"
    if train_tokens:
        epochs = params.train.max_steps * params.train.global_batch_tokens / train_tokens
        yield "epochs", f"{epochs:.3g} of the {train_tokens:,} that are not for validation"


def _disk(params: Params, corpus: Corpus | None) -> Iterator[tuple[str, str]]:
    disk = disk_of(params, corpus)

    def size(count: int | None) -> str:
        return "unknown" if count is None else format_bytes(count)

    yield "disk", f"download  data/raw     {size(disk.raw)}"
    yield (
        "",
        f"tokenize  data/tokens  {size(disk.tokens)}, {disk.token_bytes} bytes a token; while it runs {size(disk.units)} more",
    )
    yield "", f"train     models       {size(disk.model)}; while it runs {size(disk.checkpoints)} of checkpoints"
    free = shutil.disk_usage(nearest_folder(state_root())).free
    yield "", f"at most {size(disk.total)} in total, if hard links work; {size(free)} are free"


def _memory(params: Params, machines: Machines) -> Iterator[tuple[str, str]]:
    train, ranks, footprint = params.train, machines.local_ranks, _footprint(params, machines)
    device = pick_device(local_world_size=ranks)
    rows = train.micro_batch_rows(machines.world_size)
    need = footprint.memory(rows)
    parts = (f"{name} {format_bytes(count)}" for name, count in asdict(need).items() if count)
    yield "memory", f"{format_bytes(need.total)} a rank, about: {', '.join(parts)}"
    copy, on_gpu = footprint.checkpoint, device.type == "cuda"
    pinned = " (up to twice that: torch pins powers of two)" if on_gpu else ""
    yield "", f"{format_bytes(copy)}{pinned} more main memory on the first rank, while a checkpoint is written"
    # on a CPU, all ranks and the copy for the checkpoint share the main memory
    needed, here = (need.total, total_memory(device)) if on_gpu else (need.total + copy, total_memory(device) // ranks)
    what = "a GPU here" if on_gpu else "a rank here, on the CPU,"
    checkpointing = "" if train.activation_checkpointing else ", or set train.activation_checkpointing: true"
    verdict = "fits" if needed <= USABLE * here else f"does not fit: lower train.micro_batch_size{checkpointing}"
    yield "", f"{what} has {format_bytes(here)}: {verdict}"


def time_here(params: Params, ranks: int) -> Iterator[tuple[str, str]]:
    """Estimate the time of the training on this machine, from a measurement of a few seconds."""
    train = params.train
    speed = measure_speed(params, ranks)
    trained = train.max_steps * train.global_batch_tokens
    # the last step always validates, so the division rounds up
    validated = -(-train.max_steps // train.validate_every) * train.validate_tokens
    seconds = (trained + validated / 3) / (speed.tokens_per_second * ranks)  # a forward pass is a third of a step
    rate = f"{speed.tokens_per_second:,.0f} tokens/s a rank"
    yield "time", f"{format_seconds(seconds)} of training and validation, at {rate}"
    yield "", speed.how


@dataclass(frozen=True)
class Rented:
    """Machines that are not here: so many, each with so many GPUs of a kind."""

    machines: int
    gpus: int
    gpu: str
    peak: Peak
    """Of one GPU."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `2x8xH100`.

        Raises:
            UserError: the text has another form, or the GPU is unknown.
        """
        machines, _, rest = text.partition("x")
        gpus, _, gpu = rest.partition("x")
        if not (gpu and all(count.isdecimal() and int(count) for count in (machines, gpus))):
            raise UserError(
                f"--machines {text} is not MACHINESxGPUSxGPU, so there is nothing to estimate for; write, for example, "
                "--machines 2x8xH100."
            )
        if (peak := known_peak(gpu)) is None:
            raise UserError(
                f"--machines {text}: the peak of a GPU {gpu!r} is not known here, so its time cannot be estimated; the known "
                f"ones are {known_gpus()}."
            )
        return cls(int(machines), int(gpus), gpu, peak)


def costs_there(
    params: Params, corpus: Corpus | None, rented: Rented, price: float | None
) -> Iterator[tuple[str, str]]:
    """All costs on other machines, with the time of the training by arithmetic.

    Args:
        price: of a GPU and hour, in any currency.

    Raises:
        UserError: the training is not in bf16, for which the peaks are.
    """
    if params.train.precision != "bf16":
        raise UserError(
            f"train.precision = {params.train.precision}, and --machines knows the peaks of GPUs for bf16, so the time would be "
            "wrong; estimate with a preset for GPUs, such as --params presets/gpt2-124m.yaml."
        )
    yield from _training(params)
    yield from _data(params, corpus)
    train, vocab_size = params.train, planned_size(params.vocabulary)
    flops = (
        params.model.flops_per_token(vocab_size, train.sequence_length) * train.max_steps * train.global_batch_tokens
    )
    gpus = rented.machines * rented.gpus
    seconds = flops / (gpus * rented.peak.flops * ASSUMED_MFU)
    where = f"{plural(rented.machines, 'machine')} with {rented.gpus} {rented.gpu} each"
    yield (
        "there",
        f"{format_seconds(seconds)} of training on {where}, if they reach {ASSUMED_MFU:.0%} of the peak ({rented.peak.source})",
    )
    yield "", "that share is assumed, not measured; several machines reach less, by what their network takes"
    if price is not None:
        cost = seconds / 3600 * gpus * price
        yield "price", f"{cost:,.2f}, at {price:g} for a GPU and hour, without download, tokenize and evaluate"
