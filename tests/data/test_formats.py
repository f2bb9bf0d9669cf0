"""Named formats: each row becomes what its data set means by it, and a format is told by all columns of many rows."""

import json
import time
from pathlib import Path

import pytest

from jax_backtrack.data import sources
from jax_backtrack.data.formats import FORMATS, NAMES
from jax_backtrack.errors import InputError
from tests.format_rows import BAD, GOOD, HELLO, PAIRS, RANKED, REPLIES, SAFE, SYSTEM, TRANSCRIPT, UNSAFE, USER, Q, said
from tests.processes import ROOT


def read(tmp_path: Path, *rows: dict, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.read(str(path), **settings)


@pytest.mark.parametrize("case", PAIRS)
def test_rows_of_pairs(tmp_path, case):
    name, row, prompt = PAIRS[case]
    (made,), report = read(tmp_path, row)
    assert (made.prompt, made.chosen, made.rejected, made.backtracks) == (tuple(prompt), SAFE, UNSAFE, True)
    assert (report.read_as, report.used, report.dropped.total()) == (name, 1, 0)
    (utility,), _ = read(
        tmp_path, row | {key: True for key in row if key.startswith("is_") or key.endswith("_safety")}, utility=True
    )
    assert not utility.backtracks


@pytest.mark.parametrize("name", RANKED)
def test_ranked_rows_are_utility_data(tmp_path, name):
    (made,), report = read(tmp_path, RANKED[name])
    assert (made.prompt[-1], made.chosen, made.rejected, made.backtracks) == (USER, SAFE, UNSAFE, False)
    assert (report.read_as, report.dropped.total()) == (name, 0)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("nectar", {"answers": [{"answer": "a", "rank": None}]}, "the field 'rank' is missing"),
        ("distilabel", {"ratings": [3, 3, 3]}, "all replies are rated alike"),
        ("distilabel", {"ratings": [3]}, "the fields 'generations' and 'ratings' are not equally long lists"),
        ("helpsteer3", {"overall_preference": 0}, "all replies are rated alike"),
        ("ultrafeedback", {"completions": []}, "a prompt without replies"),
        ("ultrafeedback", {"completions": ["a"]}, "the field 'completions' is not a list of objects"),
    ],
)
def test_rows_without_a_better_reply_are_counted(tmp_path, name, changes, reason):
    _, report = read(tmp_path, RANKED[name], RANKED[name] | changes)
    assert report.dropped == {reason: 1}


def helpsteer2(prompt: str, response: str, helpfulness) -> dict:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 1}


def test_helpsteer2_pairs_the_rows_of_a_prompt(tmp_path):
    rows = [helpsteer2(Q, UNSAFE, 1), helpsteer2(Q, SAFE, 4), helpsteer2("Alone?", "Yes.", 3), helpsteer2(Q, "So.", 2)]
    made, report = read(tmp_path, *rows)
    assert [(one.chosen, one.rejected, one.backtracks) for one in made] == [
        (SAFE, UNSAFE, False),
        ("Yes.", None, False),
    ]
    assert report.dropped == {"neither the best nor the worst reply to its prompt": 1} and set(report.unused) == {
        "verbosity"
    }


def beaver(prompt: str, response: str, safe) -> dict:
    return {"prompt": prompt, "response": response, "category": {}, "is_safe": safe}


def test_beavertails_pairs_safe_and_unsafe_replies_of_a_prompt(tmp_path):
    rows = [
        beaver(Q, UNSAFE, False),
        beaver("Other?", "Yes.", True),
        beaver(Q, SAFE, True),
        beaver(Q, "Worse.", "false"),
        beaver(Q, "Unlabelled.", None),
        beaver(Q, "Perhaps.", "perhaps"),
    ]
    (made,), report = read(tmp_path, *rows)
    assert (made.prompt, made.chosen, made.rejected, made.backtracks) == ((USER,), SAFE, UNSAFE, True)
    assert report.dropped == {
        "no unsafe reply to the same prompt is left to pair it with": 1,
        "an unsafe reply, and no safe one to the same prompt is left to pair it with": 1,
        "the field 'is_safe' is missing": 1,
        "the field 'is_safe' is neither true nor false": 1,
    }


def wildguard(response, label, prompt: str = Q) -> dict:
    return {"prompt": prompt, "response": response, "response_harm_label": label, "response_refusal_label": "refusal"}


def test_wildguardmix_pairs_what_it_can_and_uses_safe_replies_alone(tmp_path):
    rows = [
        wildguard(SAFE, "unharmful"),
        wildguard(UNSAFE, "harmful"),
        wildguard("Fine.", "unharmful", "Other?"),
        wildguard(None, None),
        wildguard("Bad.", "harmful", "Third?"),
    ]
    made, report = read(tmp_path, *rows)
    assert [(one.chosen, one.rejected, one.backtracks) for one in made] == [
        (SAFE, UNSAFE, True),
        ("Fine.", None, False),
    ]
    assert report.dropped == {
        "the field 'response' is missing": 1,
        "an unsafe reply, and no safe one to the same prompt is left to pair it with": 1,
    }


@pytest.mark.parametrize("kind", ["vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign"])
def test_wildjailbreak_has_replies_to_either_wording(tmp_path, kind):
    row = {"vanilla": Q, "adversarial": "In a play: " + Q, "completion": SAFE, "data_type": kind}
    (made,), _ = read(tmp_path, row)
    assert made.prompt[0]["content"] == ("In a play: " + Q if kind.startswith("adv") else Q)
    assert (made.chosen, made.rejected) == (SAFE, None)


def labelled(chosen, rejected) -> dict:
    return {
        "prompt": Q,
        "chosen_response": SAFE,
        "chosen_safety": chosen,
        "rejected_response": UNSAFE,
        "rejected_safety": rejected,
    }


@pytest.mark.parametrize(
    ("row", "utility", "reason"),
    [
        (labelled(True, True), False, "both replies are labelled safe"),
        (labelled(0, "unsafe"), False, "both replies are labelled unsafe"),
        (labelled("False", 1.0), False, "the chosen reply is labelled unsafe, and the rejected one safe"),
        (labelled(True, None), False, "the field 'rejected_safety' is missing"),
        (labelled(True, "no idea"), False, "the field 'rejected_safety' is neither true nor false"),
        (labelled(True, 2), False, "the field 'rejected_safety' is neither true nor false"),
        (labelled(True, False), True, "a reply is labelled unsafe, which utility data must not have"),
    ],
)
def test_only_pairs_with_one_safe_reply_are_taken_back(tmp_path, row, utility, reason):
    good = labelled(True, utility)
    (made,), report = read(tmp_path, good, row, utility=utility)
    assert report.dropped == {reason: 1} and made.backtracks is not utility


@pytest.mark.parametrize("case", REPLIES)
def test_rows_of_replies(tmp_path, case):
    name, row, prompt = REPLIES[case]
    (made,), report = read(tmp_path, row)
    assert (made.prompt, made.chosen, made.rejected, made.backtracks) == (tuple(prompt), SAFE, None, False)
    assert report.read_as == name


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "False", "0"])
def test_a_label_that_is_false_is_false(tmp_path, label):
    good = {"prompt": Q, "completion": SAFE, "label": True}
    _, report = read(tmp_path, good, good | {"label": label})
    assert report.dropped == {"labelled as a reply that is not wanted, without one that is": 1}


# ---------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("row", "missed"),
    [
        ({"prompt": Q, "context": "A house.", "chosen": "a", "rejected": "b"}, "context"),
        ({"prompt": Q, "query": "Which?", "chosen": "a", "rejected": "b"}, "query"),
        ({"question": Q, "context": "A house.", "chosen": "a", "rejected": "b"}, "context"),
        ({"chosen": f"{Q} a", "rejected": f"{Q} b", "topic": "doors and windows"}, "topic"),
        ({"messages": [USER, GOOD], "system_prompt": "Be kind."}, "system_prompt"),
        ({"prompt": Q, "completion": "a", "history": [["Hello", "Hi!"]]}, "history"),
    ],
)
def test_a_column_that_may_belong_to_the_conversation_is_not_left_out(tmp_path, row, missed):
    """Unless it is said so, by the name of the format."""
    with pytest.raises(InputError, match=rf"the columns .* does not read {missed}\. Set data.columns.prompt"):
        read(tmp_path, row)
    name = "orca" if "question" in row else "preference" if "chosen" in row else "sft"
    _, report = read(tmp_path, row, format=name)
    assert report.used == 1 and missed in report.unused


@pytest.mark.parametrize(
    "row", [{"text": "a"}, {"question": "a", "answer": "b"}, {"query": Q, "chosen": "So a", "rejected": "So b"}]
)
def test_unknown_columns_are_named(tmp_path, row):
    with pytest.raises(InputError, match=f"the columns {', '.join(sorted(row))} are"):
        read(tmp_path, row)


def test_a_format_that_the_columns_do_not_have_names_what_it_needs(tmp_path):
    with pytest.raises(
        InputError, match=r"the columns are chosen, prompt, rejected; data\.format=pku-saferlhf needs is_resp"
    ):
        read(tmp_path, {"prompt": Q, "chosen": "a", "rejected": "b"}, format="pku-saferlhf")


def test_the_format_is_that_of_many_rows(tmp_path):
    """The first row has other columns; columns that are null in all rows do not count."""
    rows = [{"_comment": "made by X"}, {"prompt": Q, "completion": SAFE, "chosen": None, "rejected": None}]
    (made,), report = read(tmp_path, *rows)
    assert (made.chosen, report.read_as) == (SAFE, "sft")
    assert report.dropped == {"the field 'completion' is missing": 1} and set(report.unused) == {"_comment"}


def test_columns_can_be_named(tmp_path):
    row = {"query": Q, "good": SAFE, "bad": UNSAFE, "note": "x", "prompt": "p. 7"}
    (made,), report = read(
        tmp_path, row, columns={"prompt": "query", "chosen": "good", "rejected": "bad", "system": ""}
    )
    assert (made.prompt, made.chosen, made.rejected, report.read_as) == ((USER,), SAFE, UNSAFE, "preference")
    assert set(report.unused) == {"note", "prompt (not mapped)"}


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": "qery"}, r"has no column 'qery' \(data.columns.prompt\): did you mean 'query'"),
        ({"promt": "query"}, "data.columns.promt: did you mean 'prompt'"),
    ],
)
def test_columns_that_are_not_there_are_named(tmp_path, columns, problem):
    with pytest.raises(InputError, match=problem):
        read(tmp_path, {"query": Q, "chosen": SAFE, "rejected": UNSAFE}, columns=columns)


def test_what_is_not_read_is_counted(tmp_path):
    messages = [USER | {"name": "Bob", "id": 0}, GOOD | {"reasoning_content": "Hm.", "tool_calls": []}]
    _, report = read(
        tmp_path, {"messages": messages, "id": 7, "empty": None, "source": "x"}, {"messages": messages, "id": 8}
    )
    assert report.unused == {
        "id": 2,
        "source": 1,
        "messages.name": 2,
        "messages.id": 2,
        "messages.reasoning_content": 2,
    }
    shown = "columns that are not read: id, messages.id, messages.name, messages.reasoning_content, source"
    assert shown in report.lines()


def test_white_space_of_a_reply(tmp_path):
    """The indentation of a text stays, and all of a message; what a text loses at its ends is counted."""
    code = "    return 1\n  so"
    rows = [
        {"prompt": Q, "completion": f"\n \n{code}\n"},
        {"prompt": Q, "completion": f" {SAFE}"},
        {"prompt": Q, "completion": SAFE},
        {"prompt": Q, "completion": [said("assistant", f" {SAFE}\n")]},
    ]
    made, report = read(tmp_path, *rows)
    assert [one.chosen for one in made] == [code, SAFE, SAFE, f" {SAFE}\n"]
    assert report.altered == {sources.TIDIED: 2}
    assert "2 rows with white space left out at the ends of a reply (first: rows.jsonl, line 1)" in report.lines()


def test_the_documents_have_every_format():
    text = (ROOT / "docs/DATA.md").read_text()
    for name in NAMES:
        assert f"| `{name}` |" in text, name
    for format in FORMATS:
        if format.holds:
            assert f"| `{format.name}` | {format.holds} |" in text, format.name


# ------------------------------------------------------------------------------------- texts that hold a conversation

RENDERED = {
    "chatml": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": f"<|start_header_id|>user<|end_header_id|>\n\n{Q}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": f"<start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n",
    "llama-2": f"<s>[INST] {Q} [/INST]",
    "zephyr": f"<|user|>\n{Q}</s>\n<|assistant|>\n",
    "deepseek": f"<｜User｜>{Q}<｜Assistant｜>",
    "alpaca": f"Below is an instruction.\n\n### Instruction:\n{Q}\n\n### Response:\n",
    "vicuna": f"A chat. USER: {Q} ASSISTANT:",
}


@pytest.mark.parametrize("template", RENDERED)
def test_rendered_texts_are_dropped_wherever_they_stand(tmp_path, template):
    prompt = RENDERED[template]
    good = {"prompt": Q, "chosen": SAFE, "rejected": UNSAFE}
    alone = {"chosen": f"{Q} {SAFE}", "rejected": f"{Q} {UNSAFE}"}
    replies = {"chosen": f"{prompt}{SAFE}", "rejected": f"{prompt}{UNSAFE}"}
    for first, row in ((good, good | {"prompt": prompt}), (good, good | replies), (alone, replies)):
        _, report = read(tmp_path, first, row)
        assert (report.used, report.dropped.total()) == (1, 1) and "rendered" in next(iter(report.dropped))
    _, report = read(tmp_path, {"messages": [USER, GOOD]}, {"messages": [said("user", prompt), GOOD]})
    assert report.dropped == {"message 0 is a conversation that was rendered already": 1}


@pytest.mark.parametrize(
    "marks",
    [
        ("Human:", "Assistant:"),
        ("### Human:", "### Assistant:"),
        ("**Human:**", "**Assistant:**"),
        ("human:", "assistant:"),
        ("User:", "Assistant:"),
        ("USER:", "AI:"),
        ("H:", "A:"),
        ("[Human]:", "[Assistant]:"),
        ("<human>:", "<bot>:"),
        ("Human :", "Assistant :"),
        ("Human：", "Assistant："),
    ],
    ids=lambda marks: marks[0],
)
@pytest.mark.parametrize("between", ["\n\n", "\n", "\r\n\r\n"], ids=repr)
def test_transcripts_of_other_marks_are_turns(tmp_path, marks, between):
    user, assistant = marks
    turns = between.join([f"{user} Hello", f"{assistant} Hi!", f"{user} {Q}", f"{assistant} "])
    rows = {"chosen": turns + SAFE, "rejected": turns + UNSAFE}, {"prompt": turns, "chosen": SAFE, "rejected": UNSAFE}
    for row in rows if user.startswith(("H", "#", "*")) else rows[:1]:
        (made,), _ = read(tmp_path, row)
        assert (made.prompt, made.chosen, made.rejected) == ((*HELLO, USER), SAFE, UNSAFE)


def test_text_before_an_open_transcript_is_the_systems(tmp_path):
    (made,), _ = read(tmp_path, {"prompt": "Be kind.\n\nHuman: " + Q + "\n\nAssistant:", "completion": f" {SAFE}"})
    assert (made.prompt, made.chosen) == ((SYSTEM, USER), SAFE)


def test_the_indentation_of_a_transcripts_reply_stays(tmp_path):
    code = "    return 1\n  so"
    (made,), report = read(tmp_path, {"chosen": f"{TRANSCRIPT}\n{code}\n", "rejected": f"{TRANSCRIPT} {UNSAFE}"})
    assert made.chosen == code and report.altered == {sources.TIDIED: 1}


@pytest.mark.parametrize("written", [json.dumps, repr], ids=["JSON", "Python"])
def test_messages_that_are_written_as_texts_are_read(tmp_path, written):
    """As tables of texts have them: those of datasets and those of pandas."""
    row = {"prompt": written([SYSTEM, USER]), "chosen": written([GOOD]), "rejected": written([BAD])}
    (made,), _ = read(tmp_path, row)
    assert (made.prompt, made.chosen, made.rejected) == ((SYSTEM, USER), SAFE, UNSAFE)
    (made,), _ = read(tmp_path, {"prompt": Q, "completion": '{"a": 1}'})  # a reply that is JSON
    assert made.chosen == '{"a": 1}'


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": Q, "response": SAFE, "response_label": "unsafe"}, "response_label"),
        ({"prompt": Q, "completion": SAFE, "is_toxic": 1}, "is_toxic"),
        ({"messages": [USER, GOOD], "is_safe": False}, "is_safe"),
        ({"prompt": Q, "chosen": SAFE, "rejected": UNSAFE, "chosen_safe": False}, "chosen_safe"),
        ({"prompt": Q, "completion": SAFE, "rejected": UNSAFE}, "rejected"),
    ],
)
def test_labels_and_replies_that_are_not_read_are_not_left_out(tmp_path, row, column):
    with pytest.raises(InputError, match=f"which does not read {column}"):
        read(tmp_path, row)


@pytest.mark.parametrize("label", [1, 0, True, "yes", None])
def test_a_harm_label_that_is_no_word_is_counted(tmp_path, label):
    """Of 1 it is not known whether it means harmful or unharmful."""
    made, report = read(tmp_path, wildguard(SAFE, "unharmful"), wildguard(UNSAFE, label))
    assert [one.chosen for one in made] == [SAFE] and report.dropped.total() == 1


def test_rows_without_a_label_in_a_labelled_file_are_counted(tmp_path):
    rows = [{"prompt": Q, "completion": SAFE, "label": label} for label in (True, None)]
    _, report = read(tmp_path, *rows)
    assert report.dropped == {"the field 'label' is missing": 1}


def test_helpsteer2_prompts_of_several_turns_and_its_preferences(tmp_path):
    prompt = f"Hello\n<extra_id_1>Assistant\nHi!\n<extra_id_1>User\n{Q}"
    (made,), _ = read(tmp_path, helpsteer2(prompt, UNSAFE, 1), helpsteer2(prompt, SAFE, 4))
    assert (made.prompt, made.chosen) == ((*HELLO, USER), SAFE)
    for strength, chosen in ((-2, UNSAFE), (1, SAFE)):
        row = {"prompt": prompt, "response_1": UNSAFE, "response_2": SAFE, "preference_strength": strength}
        (made,), _ = read(tmp_path, row)
        assert (made.prompt, made.chosen, made.backtracks) == ((*HELLO, USER), chosen, False)


def test_a_system_column_counts_in_every_shape_of_pairs(tmp_path):
    for row in (
        {"chosen": f"{Q} {SAFE}", "rejected": f"{Q} {UNSAFE}"},
        {"chosen": f"{TRANSCRIPT} {SAFE}", "rejected": f"{TRANSCRIPT} {UNSAFE}"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ):
        (made,), _ = read(tmp_path, row | {"system": "Be kind."})
        assert made.prompt[0] == SYSTEM


def test_columns_that_cannot_be_meant_are_refused(tmp_path):
    row = {"prompt": Q, "chosen": SAFE, "rejected": UNSAFE, "note": "x"}
    with pytest.raises(InputError, match=r"data\.columns\.label: the other columns of .* are those of 'preference'"):
        read(tmp_path, row, columns={"label": "note"})
    with pytest.raises(InputError, match="are the same column 'prompt'"):
        read(tmp_path, row, columns={"prompt": "prompt", "chosen": "prompt"})


@pytest.mark.parametrize("text", ["\u3164", "\u2800", "\u202a\u202c", "\x00", "\ufe0f", " \u200b\n"])
def test_what_shows_nothing_is_empty(tmp_path, text):
    good = {"prompt": Q, "completion": SAFE}
    _, report = read(tmp_path, good, good | {"completion": text}, good | {"prompt": text})
    assert report.dropped == {"a reply is empty": 1, "the prompt is empty": 1}


def test_long_white_space_takes_no_time(tmp_path):
    """The time of some patterns grows with the square of a run of white space; this thread's own counts."""
    started = time.thread_time()
    read(tmp_path, {"chosen": TRANSCRIPT + "\n" * 50_000 + SAFE, "rejected": TRANSCRIPT + " " * 50_000 + UNSAFE})
    assert time.thread_time() - started < 20
