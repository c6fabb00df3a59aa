"""`pipelib plan`: what a parameter file would cost, without doing any of it."""

from dataclasses import dataclass
from pathlib import Path

from pipelib.cli.command import Command, option
from pipelib.errors import UserError, tell
from pipelib.files import plural
from pipelib.workspace.places import HERE

EXAMPLES = """examples:
  pipelib plan
  pipelib plan --params presets/gpt2-124m.yaml
  PIPELIB_NPROC=8 pipelib plan --no-measure     for eight ranks, by arithmetic alone
  pipelib plan --check                          would a stage refuse any of it? make repro asks that
"""


@dataclass(frozen=True)
class Plan(Command):
    """Say what a run would cost."""

    command = "plan"
    help = "say what params.yaml would cost, and do nothing"
    description = (
        "Read a parameter file as strictly as the stages do and print its parameters, steps, tokens, FLOPs, bytes on disk, "
        "memory per GPU, and the time on this machine from a measurement of a few seconds. Exit status 1 where the data, the "
        "models that it names, or the ranks here do not fit it."
    )
    examples = EXAMPLES

    params: Path = option("default: params.yaml", default=HERE.params, metavar="FILE")
    no_measure: bool = option("run nothing: leave the time out", default=False)
    check: bool = option("only look for what a stage would refuse later on", default=False)

    def run(self) -> int:
        """Print the plan as it is worked out.

        Raises:
            UserError: the parameters are wrong, or the data, the models or the ranks here do not fit them.
        """
        from pipelib.inspection.checks import check_all, checks, require_all
        from pipelib.inspection.disk import corpus_of
        from pipelib.params import load_params
        from pipelib.training.launch.machines import find_machines

        try:
            params = load_params(self.params)
        except OSError as error:
            raise UserError(
                f"{self.params} cannot be read ({error.strerror}), so nothing says what to run; name another file."
            ) from None
        corpus, machines = corpus_of(params, Path.cwd()), find_machines()
        ranks = machines.world_size
        if self.check:
            tell(check_all(self.params, params, corpus, ranks))
            return 0
        from pipelib.inspection.costs import costs, time_here, with_micro_batch

        params = with_micro_batch(params, machines)
        where = "this machine" if machines.count == 1 else f"{machines.count} machines"
        tell(f"{self.params}, with {plural(ranks, 'rank')} on {where}\n")
        for name, text in costs(params, corpus, machines):
            tell(f"{name:<12}{text}")
        require_all(checks(params, corpus, ranks))
        for name, text in () if self.no_measure else time_here(params, ranks):
            tell(f"{name:<12}{text}")
        return 0
