"""Figures that others published, for the report's table. They are not measured here, and are marked so.

A figure is shown beside the measure that it is closest to; only its source knows exactly how it was computed. For HellaSwag
and the same GPT-2 124M, others quote 0.2859, 0.2892, 0.2945, 0.2955 and 0.3114, depending on the scorer: hence the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.model.params import published_params

BUILD_NANOGPT = "build-nanogpt, play.ipynb (https://github.com/karpathy/build-nanogpt)"
LLM_C = "llm.c, dev/data/hellaswag.py (https://github.com/karpathy/llm.c)"
LLM_C_HARNESS = f"lm-eval harness, as quoted by {LLM_C}"
GPT3 = "Brown et al. 2020, table H.1, zero-shot, a scorer of their own (https://arxiv.org/abs/2005.14165)"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"

GPT3_PARAMETERS = {"GPT-3 125M": 125e6, "GPT-3 350M": 350e6, "GPT-3 760M": 760e6, "GPT-3 1.3B": 1.3e9}


@dataclass(frozen=True)
class Published:
    """A figure with its source."""

    measure: str
    """The measure it is shown beside: `hellaswag.acc_norm`."""
    model: str
    value: float
    source: str


FIGURES = (
    Published("val_loss", "GPT-2 124M", 3.2924, f"{BUILD_NANOGPT}: the first shard of sample-10BT"),
    Published("hellaswag.acc", "GPT-2 124M", 0.2859, LLM_C),
    Published("hellaswag.acc_norm", "GPT-2 124M", 0.2955, LLM_C),
    Published("hellaswag.acc_norm", "GPT-2 124M", 0.294463, BUILD_NANOGPT),
    Published("hellaswag.acc_norm", "GPT-2 350M", 0.375224, BUILD_NANOGPT),
    Published("hellaswag.acc_norm", "GPT-2 774M", 0.431986, BUILD_NANOGPT),
    Published("hellaswag.acc", "GPT-2 1558M", 0.3842, LLM_C),
    Published("hellaswag.acc_norm", "GPT-2 1558M", 0.4893, LLM_C),
    Published("hellaswag.acc_norm", "GPT-3 125M", 0.337, GPT3),
    Published("hellaswag.acc_norm", "GPT-3 350M", 0.436, GPT3),
    Published("hellaswag.acc_norm", "GPT-3 760M", 0.510, GPT3),
    Published("hellaswag.acc_norm", "GPT-3 1.3B", 0.547, GPT3),
    Published("lm_eval.hellaswag.acc", "GPT-2 124M", 0.2892, LLM_C_HARNESS),
    Published("lm_eval.hellaswag.acc_norm", "GPT-2 124M", 0.3114, LLM_C_HARNESS),
    Published("lm_eval.hellaswag.acc", "GPT-2 1558M", 0.4004, LLM_C_HARNESS),
    Published("lm_eval.hellaswag.acc_norm", "GPT-2 1558M", 0.5089, LLM_C_HARNESS),
)


def published_beside(measure: str, parameters: int, source: Mapping[str, object]) -> list[Published]:
    """The figures to show beside a measure: of models half to twice as large, or else of the smallest.

    Args:
        parameters: the size of the measured model.
        source: the corpus's source. Published losses are shown only for FineWeb-Edu, since a loss depends on the text.
    """
    if measure == "val_loss" and source.get("repo") != FINEWEB_EDU:
        return []
    figures = [figure for figure in FIGURES if figure.measure == measure]
    near = [figure for figure in figures if 0.5 <= model_sizes()[figure.model] / parameters <= 2]
    return near or [figure for figure in figures if figure.model == "GPT-2 124M"]


@cache
def model_sizes() -> Mapping[str, float]:
    """The number of parameters of each model that has a figure."""
    gpt2 = {
        model.title: published_params(name).parameters(model.vocab_size) for name, model in PUBLISHED_MODELS.items()
    }
    return gpt2 | GPT3_PARAMETERS
