"""Prompts from files and from standard input, and recipes by name; what is wrong with them is said."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from jax_backtrack.cli import with_config_path
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.files import Asked, read_prompts
from jax_backtrack.serving.chat import typed_lines


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


# ---------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "one\n\n  two \nthr\u2028ee\n"),
        ("prompts.txt", "one\r\ntwo\r\nthr\u2028ee"),
        ("prompts.jsonl", '{"prompt": "one"}\n\n{"goal": "two"}\n{"question": "thr\u2028ee", "prefix": ""}\n'),
        ("prompts.csv", "id,prompt\n1,one\n2,two\n3,thr\u2028ee\n"),
        ("prompts.csv", 'goal,target\none,a\n"two","b, c"\nthr\u2028ee,\n'),
        ("prompts.csv", "prompts_final\r\none\r\ntwo\r\nthr\u2028ee\r\n"),
        ("prompts.csv", "\ufeffquestion\none\ntwo\nthr\u2028ee\n"),
        ("prompts.csv", "Prompt;id\none;1\ntwo;2\nthr\u2028ee;3\n"),
        ("prompts.tsv", "id\tprompt\n1\tone\n2\ttwo\n3\tthr\u2028ee\n"),
        ("prompts.txt", "one\rtwo\rthr\u2028ee\r"),
        ("prompts.json", '["one", {"prompt": "two"}, {"goal": "thr\\u2028ee", "prefix": null}]'),
    ],
)
def test_one_prompt_a_line_or_row(tmp_path, name, text):
    assert read_prompts(write(tmp_path / name, text)) == [Asked("one"), Asked("two"), Asked("thr\u2028ee")]


def test_conversations_and_prefixes(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": messages}, {"prompt": "Hi", "prefix": "Sure, "}]
    path = write(tmp_path / "prompts.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [Asked(messages), Asked("Hi", "Sure, ")]


def test_a_prompt_of_several_lines_in_a_csv_file(tmp_path):
    assert read_prompts(write(tmp_path / "prompts.csv", 'prompt\n"one\ntwo, ""three"""\n')) == [
        Asked('one\ntwo, "three"')
    ]


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two\n"))
    assert read_prompts(None) == [Asked("one"), Asked("two")]
    with pytest.raises(InputError, match="no prompts in standard input"):
        read_prompts(None)


def test_limit(tmp_path):
    assert read_prompts(write(tmp_path / "prompts.txt", "one\ntwo\nthree"), limit=2) == [Asked("one"), Asked("two")]


@pytest.mark.parametrize(
    ("name", "column", "count"),
    [("advbench", "goal", 520), ("simple_safety_tests", "prompts_final", 100), ("xstest", "prompt", 450)],
)
def test_real_prompt_sets(shared, name, column, count):
    path = shared / f"data/prompts/{name}.csv"
    asked = read_prompts(str(path))
    assert len(asked) == count
    with path.open(newline="") as file:
        assert [one.prompt for one in asked] == [row[column] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("prompts.txt", "\n \n", "no prompts in .*prompts.txt"),
        ("prompts.jsonl", "", "no prompts in .*prompts.jsonl"),
        ("prompts.csv", "prompt\n", "no prompts in .*prompts.csv"),
        ("prompts.doc", "a", "a file of prompts ends in .txt, .jsonl"),
        ("prompts.json", "[]", "no prompts in .*prompts.json"),
        ("prompts.json", "[7]", "row 0 is neither a text nor an object"),
        ("prompts.jsonl", '{"prompt": "a"}\n{"prompt', "prompts.jsonl, line 2: not JSON"),
        ("prompts.jsonl", '["a"]', "line 1 is neither a text nor an object"),
        ("prompts.jsonl", '{"text": "a"}', "line 1: none of the fields prompt, goal, .* has a prompt, of text"),
        ("prompts.jsonl", '{"prompt": null}', "line 1: none of the fields prompt, .* has a prompt, of prompt"),
        ("prompts.jsonl", '{"prompt": ""}', "line 1: the field 'prompt' is empty"),
        ("prompts.jsonl", '{"prompt": "\\u200b"}', "line 1: the field 'prompt' is empty"),
        ("prompts.jsonl", '{"prompt": []}', "line 1: the field 'prompt' is an empty list"),
        ("prompts.jsonl", '{"prompt": 7}', "line 1: the field 'prompt' is a number, not a list of messages"),
        ("prompts.jsonl", '{"prompt": [{"role": "usr", "content": "a"}]}', "line 1: message 0 has the role 'usr'"),
        ("prompts.jsonl", '{"prompt": [{"role": "assistant", "content": "a"}]}', "ends with the assistant"),
        ("prompts.jsonl", '{"prompt": "a", "prefix": 7}', "line 1: the prefix is not a text"),
        ("prompts.csv", "text,id\na,1\n", "none of the fields prompt, goal, .* has a prompt, of text, id"),
        ("prompts.csv", "id,prompt\n1,a\n2\n", "prompts.csv, line 3: none of the fields prompt"),
        ("prompts.csv", "id,prompt\n1, \n", "prompts.csv, line 2: the field 'prompt' is empty"),
        ("prompts.csv", "prompt\na, b\n", "prompts.csv, line 2: a row of 2 fields under 1 column names"),
        ("prompts.csv", "prompt,prompt\na,b\n", "the column 'prompt' stands twice"),
        ("prompts.csv", 'prompt\n"' + "a" * 200_000, "prompts.csv cannot be read: unexpected end of data"),
    ],
)
def test_broken_prompt_files_are_refused(tmp_path, name, text, problem):
    with pytest.raises(InputError, match=problem):
        read_prompts(write(tmp_path / name, text))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder.txt").mkdir()
    for name in ("missing.txt", "folder.txt", "latin.txt", "a\0b.txt"):
        with pytest.raises(InputError, match=f"--prompts=.*{name} cannot be read"):
            read_prompts(str(tmp_path / name))


def test_standard_input_that_is_no_text_is_refused(monkeypatch):
    for read in (lambda: read_prompts(None), lambda: list(typed_lines())):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9\n"), encoding="utf-8"))
        with pytest.raises(InputError, match=r"standard input (cannot be read|is not UTF-8)"):
            read()


def test_what_an_error_quotes_can_be_printed(tmp_path):
    with pytest.raises(InputError) as error:
        read_prompts(write(tmp_path / "prompts.jsonl", '{"\\udc00": "a"}'))
    assert str(error.value).encode().endswith(b"of \\udc00")


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def recipes(tmp_path) -> Path:
    for name in ("demo.py", "dpo_llama.py", "base.py", "__init__.py"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("flag", ["--config", "-config"])
def test_a_recipe_by_name_becomes_its_path(recipes, flag):
    path = str(recipes / "demo.py")
    assert with_config_path(["main.py", f"{flag}=demo.py"], recipes) == ["main.py", f"{flag}={path}"]
    assert with_config_path(["main.py", flag, "demo.py", "--mode=train"], recipes) == [
        "main.py",
        flag,
        path,
        "--mode=train",
    ]


def test_a_recipe_by_path_stays(recipes, monkeypatch):
    argv = ["main.py", f"--config={recipes / 'base.py'}", "--workdir=config", "--config.train.steps=5"]
    assert with_config_path(argv, recipes) == argv
    monkeypatch.chdir(recipes)
    assert with_config_path(["main.py", "--config=demo.py"], Path("elsewhere")) == ["main.py", "--config=demo.py"]


def test_other_arguments_stay(recipes):
    for argv in (
        [],
        ["main.py", "config", "demo.py"],
        ["main.py", "--config"],
        ["main.py", "--config.model.path=demo.py"],
    ):
        assert with_config_path(argv, recipes) == argv


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("dmeo.py", "--config=dmeo.py: no such file, .*did you mean 'demo.py'"),
        ("dpo_lama", "did you mean 'dpo_llama.py'"),
        ("zzz", "known are: demo.py, dpo_llama.py$"),
        ("", "--config=: no such file"),
        ("x" * 300, "no such file"),
        ("elsewhere/demo.py", "no such file"),
    ],
)
def test_a_misspelt_recipe_names_the_nearest(recipes, capsys, name, problem):
    with pytest.raises(SystemExit) as stopped:
        with_config_path(["main.py", f"--config={name}"], recipes)
    assert stopped.value.code == 2
    assert re.search(problem, " ".join(capsys.readouterr().out.split()))
