"""The out of `finetune.source: none`."""

from pipelib.files import write_json, write_text
from pipelib.stage import Build, WorkResult
from pipelib.workspace.places import ChatPlaces, Places


def no_finetuning(build: Build) -> WorkResult:
    """Build the out of `finetune.source: none`: a manifest that says so."""
    write_json(ChatPlaces(Places(build.outs).chat).manifest, {"source": "none"})
    write_text(Places(build.outs).speed("finetune", "csv"), "step,tokens_per_second,mfu,data_wait_ms\n")
    return {"source": "none"}, {}
