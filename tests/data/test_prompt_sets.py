"""Prompt sets from real files, and what is wrong with others."""

import json

import pytest

from jax_backtrack.data import prompt_sets
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.judges.refusals import RefusalMatcher, is_refusal


@pytest.mark.parametrize(
    ("file", "harmful", "count", "targets"),
    [
        ("prompts/advbench.csv", True, 520, 520),
        ("prompts/simple_safety_tests.csv", True, 100, 0),
        ("prompts/xstest.csv", True, 200, 0),
        ("prompts/xstest.csv", False, 250, 0),
        ("prompts/mt_bench_question.jsonl", False, 80, 0),
    ],
)
def test_real_sets(shared, file, harmful, count, targets):
    name, questions = prompt_sets.read(f"A set={shared / 'data' / file}", harmful)
    assert (name, len(questions)) == ("A set", count)
    assert sum(bool(question.target) for question in questions) == targets
    assert all(len(question.messages) == 1 and question.messages[0]["content"] for question in questions)


def test_of_several_turns_the_first_is_asked(shared):
    _, questions = prompt_sets.read(str(shared / "data/prompts/mt_bench_question.jsonl"), False, limit=1)
    assert questions[0].messages[0]["content"].startswith("Compose an engaging travel blog post")


def test_the_first_messages_of_conversations_in_english(tmp_path):
    message = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi", "lang": "en"}
    rows = [message, message | {"parent_id": "1"}, message | {"lang": "de"}, message | {"deleted": True}]
    path = tmp_path / "oasst.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [question.messages[0]["content"] for question in prompt_sets.read(str(path), False)[1]] == ["Hi"]


def test_a_list_of_instructions(tmp_path):
    path = tmp_path / "I-MaliciousInstructions.json"
    path.write_text(json.dumps({"instructions": ["one", "two "]}))
    name, questions = prompt_sets.read(f"MaliciousInstructions={path}", True)
    assert name == "MaliciousInstructions" and [one.messages[0]["content"] for one in questions] == ["one", "two"]


def test_a_line_separator_does_not_end_a_row_of_csv(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,target\none\u2028two,Sure\n")
    (question,) = prompt_sets.read(str(tmp_path / "prompts.csv"), True)[1]
    assert question.messages[0]["content"] == "one\u2028two" and question.target == "Sure"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "one"}\n{"promt": "two"}', "line 2: none of prompt, goal"),
        ("a.jsonl", '{"prompt": 3}', "line 1: the field 'prompt' is a number"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", "[1]", "line 1 is neither a text nor an object"),
        ("a.json", '{"prompts": []}', "has no harmful prompts"),
        ("a.csv", "prompt\n", "has no harmful prompts"),
        ("a.csv", "prompt,label\none,safe\n", "has no harmful prompts"),
        ("a.csv", "prompt,target\n,Sure\n", "line 2: none of prompt"),
        ("a.parquet", "", "a.parquet cannot be read"),
        ("a.html", "", "a file of prompts ends in .txt, .jsonl"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        prompt_sets.read(str(tmp_path / name), True)


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("set=name=with=equals.csv", "set"),
        ("name=with=equals.csv", "name=with=equals"),  # a file of this name, in whole
        ("my set=name=with=equals.csv", "my set"),
        ("plain.csv", "plain"),
        ("X= plain.csv", "X"),
        ("a=b=plain.csv", "a=b"),
    ],
)
def test_an_entry_is_split_where_a_file_is(tmp_path, monkeypatch, entry, name):
    for file in ("name=with=equals.csv", "plain.csv"):
        (tmp_path / file).write_text("prompt\nHello\n")
    monkeypatch.chdir(tmp_path)
    assert prompt_sets.read(entry, True) == (name, [prompt_sets.Question(({"role": "user", "content": "Hello"},))])


def test_a_set_that_is_not_to_be_had():
    with pytest.raises(InputError, match="did you mean 'AdvBench'"):
        prompt_sets.read("Advbench", True)
    with pytest.raises(InputError, match="is not on the Hub: get I-Mal"):
        prompt_sets.read("MaliciousInstructions", True)
    for path in ("./missing.csv", "x" * 300, "a\0b"):
        with pytest.raises(InputError, match="no file here"):
            prompt_sets.read(path, True)


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m really sorry you feel this way.",
        "As an AI language model, I do not",
        "I cannot write that.",
        "It is illegal and unethical to do so.",
        "Hacking a government database is illegal.",
        "I must decline.",
        "Sorry, I must not tell you that.",
        "Sure, the way is Sorry, I can not give out the address.",
    ],
)
def test_refusals(reply):
    assert is_refusal(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "Sure, here is a script.",
        "You can kill a Python process with Ctrl-C.",
        "Of course! I am an expert. " + "Step one. " * 30 + "I'm sorry if this is long.",
        "",
    ],
)
def test_no_refusals(reply):
    assert not is_refusal(reply)


def test_the_matcher_takes_an_empty_reply_for_safe():
    questions = [prompt_sets.Question(({"role": "user", "content": "x"},))] * 3
    assert RefusalMatcher()(questions, ["", "Sure", "I'm sorry"]).tolist() == [0, 1, 0]
