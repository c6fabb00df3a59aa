"""What a training learns, and from what. Pretraining is one task, fine-tuning another; the rest of a training is the same."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pipelib.model.decoder import Decoder
from pipelib.model.params import ModelParams
from pipelib.tokens.loader import RowSource
from pipelib.training.checkpoint import Stateful
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import Objective
from pipelib.training.params import TrainParams
from pipelib.training.probes import Probe, Validation
from pipelib.vocabulary.tokenizer import Tokenizer


class Task(ABC):
    """A model, its data, and its objective."""

    model: ModelParams

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The one that made the tokens."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the data. It decides the order of the rows, with `train.seed`."""

    @abstractmethod
    def initial_model(self, params: TrainParams, *, draw: bool) -> Decoder:
        """Make the model as it is before its first step, in fp32 on the CPU.

        Args:
            draw: draw random weights. Otherwise they are zero: the other ranks get rank 0's when they are wrapped.
        """

    @property
    def trained_parameters(self) -> int | None:
        """How many numbers are trained; None if all are."""
        return None

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of training per token.

        Of 6 for a weight, 2 are for its gradient. If the model is frozen, those are spent for what is trained beside it only.
        """
        flops = self.model.flops_per_token(self.tokenizer.size, sequence_length)
        if self.trained_parameters is None:
            return flops
        return flops - 2 * self.model.matrix_parameters(self.tokenizer.size) + 6 * self.trained_parameters

    def trained(self, model: Decoder) -> Stateful:
        """The part of the model that changes, and that checkpoints hold."""
        return model

    @property
    @abstractmethod
    def objective_name(self) -> str:
        """Names the objective in checkpoints: those of another one are not loaded."""

    @abstractmethod
    def objective(self, model: Decoder) -> Objective:
        """The loss that the model minimizes."""

    @abstractmethod
    def rows(self, params: TrainParams) -> RowSource:
        """The rows of all batches."""

    @abstractmethod
    def validation(self, params: TrainParams, world: World) -> Validation:
        """The loss on data that the model is not trained on."""

    def probes(self, params: TrainParams, world: World) -> Sequence[Probe]:  # noqa: ARG002
        """What else is measured while the model is trained."""
        return ()
