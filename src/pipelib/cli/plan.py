"""`pipelib plan`: estimate what a run would cost, without running it."""

from dataclasses import dataclass
from pathlib import Path

from pipelib.cli.command import Command, option
from pipelib.errors import UserError, tell
from pipelib.files import plural
from pipelib.workspace.places import HERE

EXAMPLES = """examples:
  pipelib plan
  pipelib plan --params presets/gpt2-124m.yaml
  PIPELIB_NPROC=8 pipelib plan --no-measure     for eight ranks, by arithmetic only
  pipelib plan --params presets/gpt2-124m.yaml --machines 2x8xH100 --price 2.5
  pipelib plan --check                          are the parameters, and what they name, all right? make repro asks this
"""


@dataclass(frozen=True)
class Plan(Command):
    """Estimate the cost of a run."""

    command = "plan"
    help = "estimate what a run would cost, without running it"
    description = (
        "Check a parameter file as strictly as the stages do, and print parameters, steps, tokens, FLOPs, disk space, memory per "
        "GPU, and the time on this machine, from a measurement of a few seconds. Exit status 1 if the parameters do not fit the "
        "data, the models that they name, or the ranks here."
    )
    examples = EXAMPLES

    params: Path = option("parameter file; default: params.yaml", default=HERE.params, metavar="FILE")
    no_measure: bool = option("measure nothing, and leave out the time", default=False)
    machines: str | None = option(
        "estimate the time on machines that are not here, such as 2x8xH100: machines, GPUs of each, kind",
        default=None,
        metavar="NxNxGPU",
    )
    price: float | None = option(
        "with --machines: the price of a GPU and hour, for the cost", default=None, metavar="X"
    )
    check: bool = option(
        "print no plan; only check the parameters, the models and files that they name, and free space", default=False
    )

    def run(self) -> int:
        """Print the plan line by line, as it is computed.

        Raises:
            UserError: the parameters are wrong, or do not fit the data, the models or the ranks here.
        """
        from pipelib.inspection.checks import check_all, checks, require_all
        from pipelib.inspection.disk import corpus_of
        from pipelib.params import load_params
        from pipelib.training.launch.machines import find_machines

        try:
            params = load_params(self.params)
        except OSError as error:
            raise UserError(
                f"{self.params} cannot be read ({error.strerror}), so there are no parameters to plan with; name another file."
            ) from None
        if self.price is not None and (self.machines is None or not 0 <= self.price < float("inf")):
            raise UserError(
                f"--price {self.price:g} needs --machines and a number of at least 0, so there is nothing to multiply; write, "
                "for example, --machines 1x8xH100 --price 2.5."
            )
        if self.machines is not None and (self.check or self.no_measure):
            raise UserError(
                "--machines is about other machines, where nothing is checked or measured; leave the other option out."
            )
        corpus = corpus_of(params, Path.cwd())
        if self.machines is not None:
            from pipelib.inspection.costs import Rented, costs_there, within_epochs

            rented = Rented.parse(self.machines)
            tell(f"{self.params}, with {rented.machines * rented.gpus} ranks on {plural(rented.machines, 'machine')}\n")
            for name, text in costs_there(within_epochs(params, corpus), corpus, rented, self.price):
                tell(f"{name:<12}{text}")
            return 0
        machines = find_machines()
        ranks = machines.world_size
        if self.check:
            tell(check_all(self.params, params, corpus, ranks))
            return 0
        from pipelib.inspection.costs import costs, time_here, with_micro_batch, within_epochs  # slow, unlike the check

        params = within_epochs(with_micro_batch(params, machines), corpus)
        where = "this machine" if machines.count == 1 else f"{machines.count} machines"
        tell(f"{self.params}, with {plural(ranks, 'rank')} on {where}\n")
        for name, text in costs(params, corpus, machines):
            tell(f"{name:<12}{text}")
        # after the costs, so that these are printed even if something does not fit
        require_all(checks(params, corpus, ranks))
        for name, text in () if self.no_measure else time_here(params, ranks):
            tell(f"{name:<12}{text}")
        return 0
