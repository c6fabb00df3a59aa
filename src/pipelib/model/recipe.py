"""The recipe: everything that decided a model's weights, kept beside them. `recipe.json` is for programs, README.md for people.

Both depend only on what the training read, without a date or a commit, so that equal inputs give equal bytes.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelib.files import read_json, write_json, write_text
from pipelib.schema import flatten

RECIPE, README = "recipe.json", "README.md"


def write_recipe(
    folder: Path,
    recipe: Mapping[str, object],
    title: str,
    architecture: str,
    how: str = "Pretrained",
    name: str = "models",
) -> None:
    """Write recipe.json and README.md into a model's folder.

    Args:
        how: the kind of training.
        name: the folder's name in the workspace.
    """
    write_json(folder / RECIPE, recipe)
    rows = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in flatten(recipe))
    text = (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [{architecture}, pipelib]\n---\n\n"
        f"# {title}\n\n"
        f"{how} by pipelib. Load it with transformers:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        f"Everything that decided these weights, as `{RECIPE}` has it:\n\n"
        f"| what | value |\n|---|---|\n{rows}\n"
    )
    write_text(folder / README, text)


def read_recipe(folder: Path) -> dict[str, Any]:
    """Read a model's recipe, with flat keys such as `train.max_lr`. Empty if the folder has none.

    Models trained before `recipe.json` existed have the same facts in a table of their README.
    """
    if (folder / RECIPE).is_file():
        return dict(flatten(read_json(folder / RECIPE)))
    readme = folder / README
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    rows = re.findall(r"^\| ([^|\n]+) \| (.+) \|$", text, re.MULTILINE)
    try:
        return {name: json.loads(value) for name, value in rows if name != "what"}
    except json.JSONDecodeError:
        return {}
