"""Data rows, prompts and conversations."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data import prompt_sets, sources
from jax_backtrack.data.examples import encode
from jax_backtrack.sampling.files import read_prompts
from jax_backtrack.tokenizer.chat_tokenizer import check_messages
from tests.format_rows import PAIRS, RANKED, REPLIES
from tests.fuzz.odd import TEXT, changed, dumps, mangled
from tests.fuzz.trials import Refused, fuzz
from tests.records import HH, OASST, PREFERENCE, QUESTION, message

REPLY = message("assistant", "In France.")
PREFERENCES = [
    PREFERENCE,
    {"prompt": [message("system", "Be brief."), QUESTION], "chosen": [REPLY], "rejected": "No idea."},
    {"chosen": [QUESTION, REPLY], "rejected": [QUESTION, message("assistant", "No idea.")]},
]
ROWS = {"preference": PREFERENCES, "hh": [HH], "oasst": OASST}
ROWS |= {name: [row] for name, row, _ in PAIRS.values() if name not in ROWS} | {name: [RANKED[name]] for name in RANKED}
ROWS["sft"] = [row for name, row, _ in REPLIES.values() if name == "sft"]
CONVERSATIONS = [
    [QUESTION],
    [message("system", "Be brief."), QUESTION, REPLY, message("user", "And Rome?")],
    [message("user", " a [RESET] "), message("assistant", "\n"), message("user", "<|im_end|>")],
]


@pytest.fixture
def file(tmp_path):
    """Writes a file of this name and gives its path."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        return str(path)

    return write


def recipe(tokenizer) -> TreeSpec:
    return TreeSpec("dpo", True, "rewind", tokenizer.reset_id)


def read_and_encode(path: str, format: str | None, tokenizer) -> None:
    """Refused where any row is dropped; every row is either used or counted."""
    preferences, report = sources.read(path, format=format)
    used, dropped = len(preferences), report.dropped.total()
    lines = sum(bool(line.strip()) for line in Path(path).read_bytes().split(b"\n"))
    assert report.used == used and used + dropped <= lines
    if format not in (None, "oasst"):
        assert used + dropped == lines
    if format in (None, "oasst", "sft", *RANKED):
        preferences = [each for each in preferences if each.rejected]
    examples = encode(preferences, tokenizer, recipe(tokenizer), 256, report)
    assert len(examples) + report.dropped.total() == len(preferences) + dropped
    assert not any(tokenizer.special_ids & {*each.chosen[:-1], *each.rejected[:-1]} for each in examples)
    "\n".join(report.lines()).encode()
    if report.dropped:
        raise Refused


@st.composite
def files_of_rows(draw):
    """A format, or None for that of the first row, and a file of it."""
    format = draw(st.sampled_from(list(ROWS)))
    if format == "oasst":
        rows = draw(changed(st.just(OASST)))
    else:
        rows = draw(st.lists(changed(st.sampled_from(ROWS[format]), most=1), min_size=1, max_size=3))
    lines = [dumps(row) for row in rows] if isinstance(rows, list) else [dumps(rows)]
    return draw(st.sampled_from([format, None])), "\n".join(lines)


@fuzz("data rows", given=files_of_rows())
def test_data_rows(given, file, reset_tokenizer):
    format, text = given
    read_and_encode(file("rows.jsonl", text), format, reset_tokenizer)


LONG = " ".join(f"Paris is where it is for reason {number}." for number in range(9))
row_bytes = st.sampled_from(
    [
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).replace("In France.", LONG).encode() + b"\n"
        for rows in ROWS.values()
    ]
)


@fuzz("data rows, bytes", data=mangled(row_bytes, kinds=TEXT))
def test_bytes_of_data_rows(data, file, reset_tokenizer):
    read_and_encode(file("rows.jsonl", data), None, reset_tokenizer)


@fuzz("chat messages", messages=changed(st.sampled_from(CONVERSATIONS)))
def test_chat_messages(messages, reset_tokenizer):
    messages = json.loads(dumps(messages))
    check_messages(messages)
    ids = reset_tokenizer.render(messages)
    assert ids.dtype == "int32" and len(ids)
    # A mark at both ends of each message and of SmolLM2's own system message, and one where the reply begins.
    turns = len(messages) + (messages[0]["role"] != "system")
    assert sum(index in reset_tokenizer.special_ids for index in ids) == 2 * turns + 1


PROMPT_FILES = {
    ".txt": b"Where is Paris?\n\nAnd Rome?\n",
    ".jsonl": b'{"prompt": "Where is Paris?", "prefix": "It is"}\n{"prompt": [{"role": "user", "content": "Hi"}]}\n',
    ".csv": b'id,prompt\n1,Where is Paris?\n2,"And, well,\nRome?"\n',
}
prompt_files = st.one_of(
    st.tuples(st.sampled_from(list(PROMPT_FILES)), mangled(st.sampled_from(list(PROMPT_FILES.values())))),
    st.sampled_from(list(PROMPT_FILES)).flatmap(
        lambda suffix: st.tuples(st.just(suffix), mangled(st.just(PROMPT_FILES[suffix]), kinds=TEXT))
    ),
    changed(st.just([{"prompt": "Where is Paris?", "prefix": "It"}, {"goal": CONVERSATIONS[1]}])).map(
        lambda rows: (".jsonl", "\n".join(map(dumps, rows if isinstance(rows, list) else [rows])))
    ),
)


@fuzz("prompt files", given=prompt_files)
def test_prompt_files(given, file, reset_tokenizer):
    suffix, content = given
    for asked in read_prompts(file(f"prompts{suffix}", content)):
        messages = [message("user", asked.prompt)] if isinstance(asked.prompt, str) else asked.prompt
        reset_tokenizer.render(messages)
        reset_tokenizer.encode(asked.prefix)


SETS = {
    ".txt": b"Where is Paris?\n\nAnd Rome?\n",
    ".csv": b'prompt,label,target\nWhere is Paris?,unsafe,"Paris, well,\nis"\nAnd Rome?,safe,\n',
    ".jsonl": b'{"goal": "Where is Paris?", "target": "Paris is"}\n{"turns": ["Hi", "And?"], "question_id": 3}\n',
    ".json": b'{"instructions": ["Where is Paris?", {"forbidden_prompt": "And Rome?", "label": "unsafe"}]}',
}
SET_ROWS = [
    {"prompt": "Where is Paris?", "target": "Paris is", "label": "unsafe"},
    {"messages": CONVERSATIONS[1]},
    {"turns": ["Hi", "And?"]},
    OASST[0],
]
set_files = st.one_of(
    st.sampled_from(list(SETS)).flatmap(
        lambda suffix: st.tuples(st.just(suffix), mangled(st.just(SETS[suffix]), kinds=TEXT))
    ),
    changed(st.just(SET_ROWS)).map(lambda rows: (".json", dumps(rows))),
    changed(st.just(SET_ROWS)).map(
        lambda rows: (".jsonl", "\n".join(map(dumps, rows if isinstance(rows, list) else [rows])))
    ),
)


@fuzz("prompt sets", given=set_files, harmful=st.booleans())
def test_prompt_sets(given, harmful, file, reset_tokenizer):
    suffix, content = given
    path = file(f"set{suffix}", content)
    name, questions = prompt_sets.read(f"A set={path}", harmful)
    assert name == "A set" and questions
    for question in questions:
        reset_tokenizer.render(question.with_suffix(" x").with_system("Be brief.").messages)
        reset_tokenizer.encode(question.target)
