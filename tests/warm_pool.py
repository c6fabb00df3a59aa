"""Workers of `pipelib.pool`, forked with their imports done: for tests whose subject is neither their start nor their end."""

import multiprocessing
import os
from typing import Any

import pytest

from pipelib import pool

IMPORTED = [
    "pytest",
    "pipelib.tokens.encode_corpus",
    "pipelib.vocabulary.engines",
    "gigatoken",
    "tiktoken",
    "pyarrow.parquet",
]


def fork_workers(patch: pytest.MonkeyPatch, *imported: str) -> None:
    """Have every new pool fork its workers from a server. They have the environment that this process has then.

    Args:
        imported: modules that they find imported, besides those of tokenization, if no pool has been forked here yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, *imported])
    patch.setattr(multiprocessing, "get_context", lambda _: context)
    patch.setattr(pool, "_work", _Work())


class _Work:
    """The loop of a worker, which is `pool._work` there: only this process has it replaced."""

    environment: dict[str, str]

    def __getstate__(self) -> dict[str, Any]:
        return {"environment": dict(os.environ)}

    def __call__(self, *arguments: Any) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        pool._work(*arguments)
