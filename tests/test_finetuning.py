"""Conversations, their tokens and masks, their rows, and the objective on them: what a fine-tuning must not get wrong."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chat import (
    FAMILIES,
    as_dicts,
    base_model,
    encoded,
    facts,
    random_conversation,
    write_conversations,
)
from small_params import finetune_params
from small_vocabulary import train_tokenizer
from test_corpus_hub import point_at

from pipelib.corpus import hub_conversations
from pipelib.corpus.local_rows import BadRowError
from pipelib.corpus.params import HubConversationsParams
from pipelib.errors import UserError
from pipelib.finetuning.docs import conversation_about, public_name
from pipelib.finetuning.formats import conversation_of
from pipelib.finetuning.local import HubConversations, LocalConversations
from pipelib.finetuning.masks_page import masks_page
from pipelib.finetuning.objective import Answers
from pipelib.finetuning.packing import IGNORED, ConversationRows, pack
from pipelib.model.huggingface import export_model
from pipelib.vocabulary.chat import ASSISTANT, SYSTEM, USER, ChatTemplate, Message, order_problem
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import PATTERNS, Tokenizer

QUESTION, ANSWER = Message(USER, "Where is Bako?"), Message(ASSISTANT, "In Duri.")


# ---- The template ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [None, *PATTERNS])
def test_tokens_and_masks_are_those_of_the_exported_template(tmp_path: Path, rule: str | None) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(tmp_path / "vocabulary", rule) if rule else GPT2_TOKENIZER
    template = ChatTemplate.of(tokenizer)
    export_model(base_model("gpt2", tokenizer.size), tokenizer, tmp_path / "model", {}, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    chance = random.Random(3)
    with_markers = 0
    for _ in range(500 if rule == "gpt2" else 125):
        messages = random_conversation(chance)
        turns = template.turns(messages)
        tokens = [token for turn in turns for token in turn.token_ids]
        made = theirs.apply_chat_template(as_dicts(messages), sanitize_control_tokens=True)
        assert tokens == made["input_ids"], messages
        prompt = theirs.apply_chat_template(
            as_dicts(messages[:-1]), sanitize_control_tokens=True, add_generation_prompt=True
        )
        assert template.prompt(messages[:-1]) == prompt["input_ids"]
        if any(template.spells_marker(message.content) for message in messages):
            with_markers += 1  # transformers refuses both options together
            continue
        made = theirs.apply_chat_template(as_dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
        mask = [
            turn.role == ASSISTANT and place in range(*turn.content.indices(len(turn.token_ids)))
            for turn in turns
            for place in range(len(turn.token_ids))
        ]
        assert mask == [bool(value) for value in made["assistant_masks"]], messages
    assert with_markers > 10


def test_the_generation_stops_where_a_turn_or_a_text_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = ChatTemplate.of(tokenizer)
    export_model(base_model("qwen3", tokenizer.size), tokenizer, tmp_path / "own", {}, template)
    stops = json.loads((tmp_path / "own/generation_config.json").read_bytes())["eos_token_id"]
    assert stops == [tokenizer.special_tokens["<|im_end|>"], tokenizer.end_token_id]
    gpt2 = ChatTemplate.of(GPT2_TOKENIZER)
    assert gpt2.stop_token_id == GPT2_TOKENIZER.end_token_id
    text = GPT2_TOKENIZER.decode([token for turn in gpt2.turns([QUESTION, ANSWER]) for token in turn.token_ids])
    assert text == "User:\nWhere is Bako?<|endoftext|>Assistant:\nIn Duri.<|endoftext|>"


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ([USER], "the last turn is the user's"),
        ([USER, USER, ASSISTANT], "turns 1 and 2 are both of the role user"),
        ([ASSISTANT], "the first turn is of the role assistant"),
        ([USER, ASSISTANT, SYSTEM, USER, ASSISTANT], "a system message is not the first one"),
        ([SYSTEM], "there is no turn"),
        ([], "there is no turn"),
        ([SYSTEM, USER, ASSISTANT, USER, ASSISTANT], ""),
    ],
)
def test_roles_alternate_and_end_with_an_answer(roles: list[str], words: str) -> None:
    problem = order_problem([Message(role, "x") for role in roles])
    assert (words in problem) if words else problem == ""


# ---- Formats ---------------------------------------------------------------------------------------------------------

SYSTEM_MESSAGE = Message(SYSTEM, "Be brief.")
TURNS = as_dicts([QUESTION, ANSWER])
SHAREGPT = [{"from": "human", "value": QUESTION.content}, {"from": "gpt", "value": ANSWER.content}]
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}]}
THREE = Message(ASSISTANT, "3")


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("messages", {"messages": TURNS}, [QUESTION, ANSWER]),
        ("messages", {"messages": [IN_PARTS, TURNS[1]]}, [Message(USER, "a"), ANSWER]),
        (
            "sharegpt",
            {"system": "Be brief.", "conversations": SHAREGPT},
            [SYSTEM_MESSAGE, QUESTION, ANSWER],
        ),
        ("sharegpt", {"conversations": TURNS}, [QUESTION, ANSWER]),
        ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, [Message(USER, "Add.\n\n1, 2"), THREE]),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, [Message(USER, "Add."), THREE]),
        ("prompt", {"prompt": QUESTION.content, "completion": ANSWER.content}, [QUESTION, ANSWER]),
        ("prompt", {"prompt": TURNS[:1], "response": ANSWER.content}, [QUESTION, ANSWER]),
    ],
)  # fmt: skip
def test_each_format_is_recognised_or_named(name: str, row: dict[str, Any], expected: list[Message]) -> None:
    assert conversation_of(row, "auto", "a, row 1") == expected
    assert conversation_of(row, name, "a, row 1") == expected


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"text": "x"}, "unknown columns", "there is no column of a conversation (it has text)"),
        ({"messages": TURNS, "prompt": "x"}, "unknown columns", "columns of several formats"),
        ({"instruction": "x"}, "unknown columns", "the column output is missing"),
        ({"messages": TURNS[:1]}, "roles", "no answer to learn from"),
        ({"messages": [TURNS[0], {"role": "tool", "content": "x"}]}, "turns", "the role 'tool' is not one of"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "turns", "role assistant is empty, not a text"),
        ({"messages": "x"}, "turns", "messages is text, not a list of turns"),
        ({"messages": ["x"]}, "turns", "a turn is text, not an object"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\ud800"}]}, "turns", "cannot be written as UTF-8"),
        ({"prompt": 3, "completion": "x"}, "turns", "prompt is a whole number, not a text"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "x", "tool_calls": [1]}]}, "turns", "calls tools"),
        ({"messages": [{"content": "x"}]}, "turns", "a turn has no role (only content)"),
        ({"conversations": [None]}, "turns", "a turn is empty, not an object"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": [{"type": "text"}]}]}, "turns", "is a list, not a text"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_a_conversation_says_why(row: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(BadRowError) as caught:
        conversation_of(row, "auto", "a.jsonl, row 7")
    assert caught.value.reason == reason
    assert caught.value.problem.startswith("a.jsonl, row 7: ")
    assert words in caught.value.problem


def test_files_of_all_kinds_give_the_same_conversations(here: Path) -> None:
    import pandas as pd

    told = facts(12)
    rows = [{"messages": as_dicts(messages)} for messages in told]
    write_conversations(here / "jsonl/a.jsonl", told)
    for name in ("json", "parquet", "gz"):
        (here / name).mkdir()
    (here / "json/a.json").write_text(json.dumps(rows), encoding="utf-8")
    pd.DataFrame(rows).to_parquet(here / "parquet/a.parquet")
    pd.DataFrame(rows).to_json(here / "gz/a.jsonl.gz", orient="records", lines=True)
    for name in ("jsonl", "json", "parquet", "gz"):
        source = LocalConversations(finetune_params(source="local", path=name))
        assert [messages for _, messages in source.read()] == told
    csv = pd.DataFrame({"instruction": ["Add 1 and 2."], "output": ["3"]})
    csv.to_csv(here / "a.csv", index=False)
    ((where, messages),) = LocalConversations(finetune_params(source="local", path="a.csv")).read()
    assert where == "a.csv, row 1"
    assert messages[1] == Message(ASSISTANT, "3")


def test_a_bad_row_is_refused_by_name_or_skipped_and_counted(here: Path) -> None:
    write_conversations(here / "c/a.jsonl", facts(40))
    with (here / "c/a.jsonl").open("a") as file:
        file.write('{"messages": []}\nnot JSON\n{"text": "x"}\n')
    with pytest.raises(
        UserError, match=r"a\.jsonl, row 41: there is no turn .*; fix this row, skip it with finetune\.bad_rows"
    ):
        list(LocalConversations(finetune_params(source="local", path="c")).read())
    source = LocalConversations(finetune_params(source="local", path="c", bad_rows="skip"))
    assert len(list(source.read())) == 40
    assert source.bad_rows == {"roles": 1, "not JSON": 1, "unknown columns": 1}
    (here / "c/b.jsonl").write_text('{"text": "x"}\n' * 20, encoding="utf-8")
    source = LocalConversations(finetune_params(source="local", path="c", bad_rows="skip"))
    list(source.read())
    with pytest.raises(UserError, match=r"23 of 63 rows are bad, .*; fix the files, or set finetune\.format:\n"):
        source.finish()
    (here / "c/notes.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match=r"finetune\.path: notes\.txt is text without rows"):
        LocalConversations(finetune_params(source="local", path="c")).identity()
    with pytest.raises(UserError, match=r"finetune\.path: nowhere does not exist"):
        LocalConversations(finetune_params(source="local", path="nowhere")).identity()


def test_another_encoding_is_refused_with_a_remedy_that_this_stage_has(here: Path) -> None:
    write_conversations(here / "c/a.jsonl", facts(3))
    content = (here / "c/a.jsonl").read_text(encoding="utf-8")
    for name, damaged, words in (
        ("stray", content.replace("Where", "Wh\xe4re").encode("cp1252"), "line 1: there is the byte 0xe4"),
        ("utf-16", content.encode("utf-16"), "is UTF-16"),
    ):
        (here / "c/a.jsonl").write_bytes(damaged)
        with pytest.raises(UserError, match=words) as caught:
            list(LocalConversations(finetune_params(source="local", path="c")).read())
        assert "iconv" in str(caught.value), name
        assert "download." not in str(caught.value), name


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_conversations_of_the_hub_are_those_of_its_files(
    kind: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    told = facts(12)
    rows = [{"messages": as_dicts(messages)} for messages in told]
    frames = [pd.DataFrame(rows[:7]), pd.DataFrame(rows[7:])]
    files = {"data/readme.txt": b"hello"}
    for number, frame in enumerate(frames):
        content = frame.to_parquet() if kind == "parquet" else frame.to_json(orient="records", lines=True).encode()
        files[f"data/part {number}.{kind}"] = content
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(here / "state"))
    chosen = HubConversationsParams("someone/talk", "a" * 40, "data")
    with FakeHub("someone/talk", "a" * 40, files) as hub:
        point_at(hub.url, monkeypatch)
        hub_conversations.write_conversations(chosen, here / "first")
        asked = len(hub.requests)
        hub_conversations.write_conversations(chosen, here / "again")
        assert len(hub.requests) == asked, "files and their list are stored"
    source = HubConversations(finetune_params(source="hub"), folder=here / "first")
    assert [messages for _, messages in source.read()] == told
    assert HubConversations(finetune_params(source="hub"), folder=here / "again").identity() == source.identity()
    name = next(iter(source.identity()["files"]))
    (here / "first" / name).unlink()
    with pytest.raises(UserError, match="is missing or damaged, so conversations would be lost"):
        HubConversations(finetune_params(source="hub"), folder=here / "first").identity()
    hub_conversations.write_conversations(None, here / "none")
    with pytest.raises(UserError, match=r"it has no conversations; name them in download\.conversations"):
        HubConversations(finetune_params(source="hub"), folder=here / "none").identity()


# ---- Docstrings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        ("numpy._core.fromnumeric.clip", "numpy.clip"),
        ("scipy.stats._stats_py.iqr", "scipy.stats.iqr"),
        ("torch._tensor.Tensor.register_hook", "torch.Tensor.register_hook"),
        ("sympy.series.fourier.FourierSeries.truncate", "sympy.series.fourier.FourierSeries.truncate"),
        ("numpy._core._private", ""),
        ("numpy", ""),
    ],
)
def test_names_are_those_that_people_import(identity: str, name: str) -> None:
    assert public_name(identity) == name


NUMPY_STYLE = """Clip (limit) the values in
an array.

Parameters
----------
a : array_like
    Array containing elements.
min, max : scalar, optional
    Limits.

Returns
-------
clipped_array : ndarray
    An array.

Notes
-----
x : nothing
"""
GOOGLE_STYLE = """Applies a filter. It is fast.

Args:
    size (int): its size; see https://example.org
    *rest: the others

Returns:
    Tensor: the output

Example::
    later: x
"""


@pytest.mark.parametrize(
    ("name", "docstring", "answers"),
    [
        (
            "numpy.clip",
            NUMPY_STYLE,
            ("Clip (limit) the values in an array.", "The parameters are a, min and max.", "clipped_array : ndarray"),
        ),
        ("torch.f", GOOGLE_STYLE, ("Applies a filter.", "The parameters are size and *rest.", "Tensor: the output")),
    ],
)
def test_docstrings_of_both_styles_become_questions_and_answers(
    name: str, docstring: str, answers: tuple[str, ...]
) -> None:
    contents = [message.content for message in conversation_about(name, docstring)]
    assert contents[0::2] == [f"What does {name} do?", "What are its parameters?", "What does it return?"]
    assert tuple(contents[1::2]) == answers


@pytest.mark.parametrize("text", ["x.clip(1)", "lower case.", "No end", "A" * 400 + ".", "::\n\n  code", ""])
def test_docstring_without_a_first_sentence_becomes_nothing(text: str) -> None:
    assert conversation_about("a.b", text) == []


# ---- Tokens and masks ------------------------------------------------------------------------------------------------


def test_only_answers_are_trained_and_a_conversation_ends_with_its_last_one(tokenizer: Tokenizer) -> None:
    conversation = [SYSTEM_MESSAGE, QUESTION, ANSWER, Message(USER, "And Mela?"), Message(ASSISTANT, "Too.")]
    others = facts(3)
    for train_on, expected in (
        ("assistant", ["In Duri.<|im_end|>", "Too.<|im_end|>"]),
        ("last", ["Too.<|im_end|>"]),
        ("all", None),
    ):
        dataset, counts = encoded([conversation, *others], tokenizer, 200, train_on=train_on)
        tokens, mask = dataset.tokens(0), dataset.mask(0)
        assert tokenizer.decode(tokens.tolist()).endswith("<|im_start|>assistant\nToo.<|im_end|>")
        runs = [
            tokenizer.decode([int(token) for token, _ in run])
            for trained, run in itertools.groupby(zip(tokens, mask, strict=True), key=lambda pair: bool(pair[1]))
            if trained
        ]
        assert runs == (expected or [tokenizer.decode(tokens.tolist())])
        assert tokenizer.decode(tokens[slice(*dataset.answers[0])].tolist()) == "Too.<|im_end|>"
        assert counts.trained_tokens == int(dataset.trained.sum()) > 0


def test_long_conversations_are_cut_after_an_answer_or_left_out_and_counted(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.of(tokenizer)
    exchanges = [QUESTION, ANSWER, Message(USER, "And " + "x " * 40 + "?"), Message(ASSISTANT, "No.")]
    first = sum(len(turn.token_ids) for turn in template.turns(exchanges[:2])) - 1  # less the line end after it
    dataset, counts = encoded([exchanges, *facts(3)], tokenizer, first - 1)
    assert counts.cut == 1
    assert counts.named["cut"] == ["row 1"]
    assert len(dataset.tokens(0)) == first
    dataset, counts = encoded([exchanges, [QUESTION, Message(ASSISTANT, "y " * 60)], *facts(3)], tokenizer, 50)
    assert (counts.cut, counts.too_long, counts.named["too_long"]) == (1, 1, ["row 2"])
    with pytest.raises(
        UserError, match=r"all 1 conversations are longer than 4 tokens, so there is nothing to train on; raise"
    ):
        encoded([[QUESTION, ANSWER]], tokenizer, 4)
    with pytest.raises(UserError, match="held out for validation, so there is nothing to train on"):
        encoded([[QUESTION, ANSWER]] * 3, tokenizer, 64)


def test_contents_that_spell_a_marker_are_text_and_are_counted(tokenizer: Tokenizer) -> None:
    spelled = [QUESTION, Message(ASSISTANT, "Write <|im_end|> there.")]
    dataset, counts = encoded([spelled, *facts(5)], tokenizer, 64)
    assert counts.markers == 1
    stop = tokenizer.special_tokens["<|im_end|>"]
    assert (dataset.tokens(0) == stop).sum() == 2, "a content is never a special token"


def test_what_is_held_out_depends_on_the_conversation_alone(tokenizer: Tokenizer) -> None:
    told = facts(300)
    few, _ = encoded(told[:150], tokenizer, validation=0.2)
    many, _ = encoded(told, tokenizer, validation=0.2)
    assert few.held_out.tolist() == many.held_out[:150].tolist()
    assert 0.1 < many.held_out.mean() < 0.3
    alone, _ = encoded(told[:2], tokenizer, validation=0.0)
    assert alone.held_out.sum() == 1, "at least one is"


def test_copies_are_in_one_split_also_where_they_differ_after_the_cut(tokenizer: Tokenizer) -> None:
    told = [messages for messages in facts(10) for _ in range(3)]
    dataset, _ = encoded(told, tokenizer, validation=0.0)
    assert dataset.held_out.reshape(10, 3).sum(1).tolist() in [
        [3 * (number == first) for number in range(10)] for first in range(10)
    ]
    same_start = [[QUESTION, ANSWER, Message(USER, f"{number} " * 60), ANSWER] for number in range(20)]
    dataset, counts = encoded([*same_start, *facts(5)], tokenizer, validation=0.3)
    assert counts.cut == 20
    assert dataset.held_out[:20].all() or not dataset.held_out[:20].any()


def test_what_is_left_out_by_number_is_said(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, _ = encoded(facts(9), tokenizer, most=4)
    assert len(dataset) == 4
    assert "the first 4 conversations are taken; finetune.max_conversations: null takes all" in capsys.readouterr().out


def test_the_page_shows_what_is_trained(tokenizer: Tokenizer) -> None:
    conversation = [Message(USER, "<b> & so?"), Message(ASSISTANT, "a < b")]
    dataset, _ = encoded([conversation, *facts(4)], tokenizer)
    page = masks_page(dataset, [0], tokenizer)
    assert "&lt;b&gt; &amp; so?" in page
    assert "<mark>a &lt; b&lt;|im_end|&gt;</mark>" in page


# ---- Rows ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 24))
@settings(max_examples=200, deadline=None)
def test_every_conversation_is_packed_once_and_no_row_overflows(lengths: list[int], room: int) -> None:
    rows = pack(np.array(lengths, np.int64), room)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= room for row in rows)
    # Best fit leaves no two rows that would fit into one.
    filled = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > room


def rows_of(dataset: Any, *, packing: bool, length: int = 96) -> ConversationRows:
    return ConversationRows.of(dataset, np.arange(len(dataset)), length, padding=0, packing=packing)


def test_rows_hold_every_target_once_with_its_position(tokenizer: Tokenizer) -> None:
    dataset, _ = encoded(facts(40), tokenizer)
    for packing in (True, False):
        rows = rows_of(dataset, packing=packing)
        inputs, targets, positions = rows.batch(np.arange(len(rows)))
        assert inputs.shape == targets.shape == positions.shape == (len(rows), 96)
        counted = targets != IGNORED
        wanted = np.concatenate([dataset.tokens(number)[dataset.mask(number)] for number in range(len(dataset))])
        assert sorted(targets[counted]) == sorted(wanted)
        assert (positions == 0).sum(1).min() >= 1
    assert len(rows_of(dataset, packing=True)) < len(rows_of(dataset, packing=False)) == 40


# ---- The objective ---------------------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def loss_and_gradients(model: Any, rows: ConversationRows, *, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    objective = Answers(model, packed=packed)
    batch = [torch.from_numpy(array) for array in rows.batch(np.arange(len(rows)))]
    loss = objective(*batch) / objective.target_count(batch[1])
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family: str, tokenizer: Tokenizer) -> None:
    dataset, _ = encoded(facts(24), tokenizer)
    model = base_model(family, tokenizer.size).double()
    packed, gradient = loss_and_gradients(model, rows_of(dataset, packing=True), packed=True)
    alone, expected = loss_and_gradients(model, rows_of(dataset, packing=False), packed=False)
    assert abs(packed - alone) < 1e-10
    assert (gradient - expected).abs().max() < 1e-10
    single = model.float()
    packed, gradient = loss_and_gradients(single, rows_of(dataset, packing=True), packed=True)
    alone, expected = loss_and_gradients(single, rows_of(dataset, packing=False), packed=False)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_in_a_row_has_the_logits_it_has_alone(family: str, tokenizer: Tokenizer) -> None:
    dataset, _ = encoded(facts(12), tokenizer)
    model = base_model(family, tokenizer.size).double()
    rows = rows_of(dataset, packing=True)
    inputs, _, positions = map(torch.from_numpy, rows.batch(np.arange(len(rows))))
    with torch.no_grad():
        hidden = Answers(model, packed=True)._hidden(inputs, positions)
        for row, numbers in enumerate(rows._rows):
            start = 0
            for number in numbers:
                tokens = torch.from_numpy(dataset.tokens(number).astype(np.int64))[None, :-1]
                end = start + tokens.shape[1]
                alone = model.logits(model.hidden(tokens)[0])[:, : tokenizer.size]
                assert (model.logits(hidden[row, start:end])[:, : tokenizer.size] - alone).abs().max() < 1e-10
                start = end


def test_a_masked_label_changes_no_bit_and_a_trained_one_does(tokenizer: Tokenizer) -> None:
    told = facts(8)
    dataset, _ = encoded(told, tokenizer)
    rows, model = rows_of(dataset, packing=True), base_model("qwen3", tokenizer.size)
    _, before = loss_and_gradients(model, rows, packed=True)
    batch = [torch.from_numpy(array) for array in rows.batch(np.arange(len(rows)))]

    def with_label(place: tuple[int, ...]) -> torch.Tensor:
        """The gradients with another label at one place, where the mask stays."""
        targets = batch[1].clone()
        if targets[place] != IGNORED:
            targets[place] = (targets[place] + 1) % tokenizer.size
        model.zero_grad()
        objective = Answers(model, packed=True)
        (objective(batch[0], targets, batch[2]) / objective.target_count(targets)).backward()
        return gradients(model)

    masked, trained = (
        tuple((batch[1] == IGNORED).nonzero()[7].tolist()),
        tuple((batch[1] != IGNORED).nonzero()[7].tolist()),
    )
    assert torch.equal(with_label(masked), before)
    assert not torch.equal(with_label(trained), before)


def test_the_compiled_objective_is_the_same(tokenizer: Tokenizer) -> None:
    """A compiler takes the branch that keeps the shape."""
    dataset, _ = encoded(facts(12), tokenizer)
    model, rows = base_model("qwen3", tokenizer.size), rows_of(dataset, packing=True)
    batch = [torch.from_numpy(array) for array in rows.batch(np.arange(len(rows)))]
    plain = Answers(model, packed=True)(*batch)
    compiled = torch.compile(Answers(model, packed=True), backend="eager")(*batch)
    assert torch.allclose(plain, compiled, rtol=1e-5)
