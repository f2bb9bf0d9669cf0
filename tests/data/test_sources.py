"""Rows of files become preferences, and every row that does not is counted under its reason."""

import dataclasses
import gzip
import json
from pathlib import Path

import datasets
import pytest

from jax_backtrack.data import sources
from jax_backtrack.data.conversations import tidy
from jax_backtrack.data.reading import text_files
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.files import Asked, write_samples
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.settings import SamplingParams
from tests import tiny
from tests.records import HH, OASST, PREFERENCE, QUESTION, SAMPLE, message, oasst


def write(path: Path, rows) -> str:
    """Writes rows as JSON lines; a text stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# -------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_hh_rows(tmp_path, name):
    (row,), report = sources.read(write(tmp_path / name, [HH]))
    assert row.prompt == (message("user", "Hi"), message("assistant", "Hello!"), QUESTION)
    assert (row.chosen, row.rejected, row.backtracks) == ("In France.", "No idea.", True)
    assert row.origin == f"{name}, line 1"
    assert (report.used, report.dropped.total()) == (1, 0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_oasst_rows_give_the_best_and_the_worst_reply(tmp_path, name):
    (row,), report = sources.read(write(tmp_path / name, OASST), utility=True)
    assert row.prompt == (QUESTION,)
    assert (row.chosen, row.rejected, row.backtracks) == ("In France.", "No idea.", False)
    assert (report.used, report.dropped.total()) == (1, 0)


def test_an_oasst_question_with_one_reply_has_no_rejected_one(tmp_path):
    (row,), _ = sources.read(write(tmp_path / "rows.jsonl", [OASST[0], oasst("a", "q", "In France.")]), utility=True)
    assert (row.chosen, row.rejected) == ("In France.", None)


def as_messages(text: str) -> list[dict[str, str]]:
    return [message("assistant", text)]


@pytest.mark.parametrize(
    "row",
    [
        PREFERENCE,
        PREFERENCE | {"prompt": [QUESTION]},
        PREFERENCE | {"chosen": as_messages("In France."), "rejected": as_messages("No idea.")},
        {"chosen": [QUESTION, *as_messages("In France.")], "rejected": [QUESTION, *as_messages("No idea.")]},
        # As in HuggingFaceH4/ultrafeedback_binarized: the prompt stands twice.
        PREFERENCE
        | {"chosen": [QUESTION, *as_messages("In France.")], "rejected": [QUESTION, *as_messages("No idea.")]},
        PREFERENCE | {"chosen": " In France.\n", "id": 7},
        {"chosen": "Where is Paris? In France.", "rejected": "Where is Paris? No idea."},
    ],
    ids=["texts", "prompt messages", "reply messages", "implicit prompt", "prompt twice", "white space", "one text"],
)
def test_preference_rows(tmp_path, row):
    (made,), report = sources.read(write(tmp_path / "rows.jsonl", [row]))
    assert made.prompt == (QUESTION,)
    assert (made.chosen, made.rejected, made.backtracks) == ("In France.", "No idea.", True)
    assert (report.used, report.dropped.total()) == (1, 0)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, *as_messages("In France.")]},
        {"prompt": "Where is Paris?", "completion": " In France."},
        {"prompt": [QUESTION], "completion": as_messages("In France.")},
        {"prompt": "Where is Paris?", "completion": "In France.", "label": True},
    ],
    ids=["messages", "texts", "message lists", "labelled"],
)
def test_sft_rows_have_nothing_to_take_back(tmp_path, row):
    """As safety data as well."""
    (made,), report = sources.read(write(tmp_path / "rows.jsonl", [row]))
    assert (made.prompt, made.chosen, made.rejected, made.backtracks) == ((QUESTION,), "In France.", None, False)
    assert (report.used, report.dropped.total()) == (1, 0)


def test_of_several_turns_the_last_reply_is_the_one_to_learn(tmp_path):
    said = [message("system", "Be brief."), message("user", "Hi"), *as_messages("Hello!"), QUESTION]
    (made,), _ = sources.read(write(tmp_path / "rows.jsonl", [{"messages": [*said, *as_messages("In France.")]}]))
    assert (made.prompt, made.chosen) == (tuple(said), "In France.")


TRL = [
    PREFERENCE,
    {"prompt": [QUESTION], "chosen": as_messages("In France."), "rejected": as_messages("No idea.")},
    {"messages": [QUESTION, *as_messages("In France.")]},
]


@pytest.mark.parametrize("row", TRL, ids=["standard", "conversational", "messages"])
@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "lines.json", "rows.parquet", "saved", "splits"])
def test_files_and_folders_that_datasets_writes(tmp_path, name, row):
    """What datasets itself writes, read back: as the same rows in JSON lines."""
    table, path = datasets.Dataset.from_list([row, row]), tmp_path / name
    if name == "saved":
        table.save_to_disk(path)
    elif name == "splits":
        datasets.DatasetDict(test=table, train=table.select([0])).save_to_disk(path)
    elif name == "rows.parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, lines=name == "lines.json", compression="gzip" if name.endswith(".gz") else None)
    found, report = sources.read(str(path), split="test")
    expected, _ = sources.read(write(tmp_path / "rows.jsonl", [row, row]))
    assert [dataclasses.replace(one, origin="") for one in found] == [
        dataclasses.replace(one, origin="") for one in expected
    ]
    assert report.dropped.total() == 0
    assert [one.origin for one in found] == [
        f"{name}, line {number + 1}" if name == "lines.json" else f"{name}, row {number}" for number in range(2)
    ]


def test_a_split_that_a_folder_does_not_have_is_named(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list([PREFERENCE])).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"has no split 'tran' .*did you mean 'train'"):
        sources.read(str(tmp_path / "saved"), split="tran")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json"])
def test_a_damaged_table_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'[{"prompt": "a"')
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        sources.read(str(tmp_path / name))


def test_utility_data_is_never_taken_back(tmp_path):
    for row in (PREFERENCE, HH):
        (made,), _ = sources.read(write(tmp_path / "rows.jsonl", [row]), utility=True)
        assert not made.backtracks


def test_the_testbed_is_a_source():
    preferences, report = sources.read("testbed", split="test", limit=20)
    assert len(preferences) == report.used == 20
    assert {preference.backtracks for preference in preferences} == {True, False}


# ------------------------------------------------------------------------------------------------ lines, limit


def test_line_separators_inside_a_text_do_not_split_its_row(tmp_path):
    text = "one\u2028two\u0085three\u2029four\rfive\nsix\x1cseven"
    path = write(tmp_path / "rows.jsonl", [PREFERENCE | {"prompt": text}, PREFERENCE])
    assert "\u2028two\u0085three" in Path(path).read_text()
    rows, report = sources.read(path)
    assert [row.prompt[0]["content"] for row in rows] == [text, "Where is Paris?"]
    assert report.dropped.total() == 0


def test_windows_line_ends_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PREFERENCE).encode() + b"\r\n\r\n" + json.dumps(PREFERENCE).encode())
    rows, report = sources.read(str(path))
    assert [row.origin for row in rows] == ["rows.jsonl, line 1", "rows.jsonl, line 3"]
    assert report.dropped.total() == 0


def test_a_file_name_is_not_a_pattern(tmp_path):
    write(tmp_path / "rows1.jsonl", [PREFERENCE] * 2)
    rows, _ = sources.read(write(tmp_path / "rows[1].jsonl", [PREFERENCE]))
    assert len(rows) == 1


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", [PREFERENCE])
    assert len(sources.read("~/rows.jsonl")[0]) == 1


def test_limit_counts_usable_rows(tmp_path):
    rows = [PREFERENCE | {"prompt": str(number)} for number in range(9)]
    rows[1] = "broken"
    made, report = sources.read(write(tmp_path / "rows.jsonl", rows), limit=3)
    assert [row.prompt[0]["content"] for row in made] == ["0", "2", "3"]
    assert (report.used, report.dropped.total()) == (3, 1)


# ------------------------------------------------------------------------------------------- reasons to drop

turn = "\n\nHuman: Hi\n\nAssistant:"
SAID_AGAIN = "both replies say their prompt again"
WRITTEN = "the field 'chosen' is a list of messages written as a text that is no JSON, not a list of messages"
NOT_UNICODE = "a text is not valid Unicode: it holds half of a surrogate pair"
REASONS = [
    ("preference", '{"prompt": "Wh', "not JSON"),
    ("preference", '["prompt"]', "not a JSON object"),
    ("preference", "7", "not a JSON object"),
    ("preference", {"prompt": "a", "chosen": "b"}, "the field 'rejected' is missing"),
    ("preference", {"prompt": "a", "rejected": "b"}, "the field 'chosen' is missing"),
    ("preference", PREFERENCE | {"chosen": None}, "the field 'chosen' is missing"),
    ("preference", {"chosen": "a", "rejected": "b"}, "the field 'prompt' is missing"),
    ("preference", PREFERENCE | {"chosen": " \n"}, "a reply is empty"),
    ("preference", PREFERENCE | {"rejected": ""}, "a reply is empty"),
    ("preference", PREFERENCE | {"rejected": "In France. "}, "chosen and rejected are the same reply"),
    ("preference", PREFERENCE | {"prompt": ""}, "the prompt is empty"),
    ("preference", json.dumps(PREFERENCE | {"prompt": "a \ud83d"}), NOT_UNICODE),
    ("preference", json.dumps(PREFERENCE | {"chosen": "\udc00"}), NOT_UNICODE),
    ("preference", {"chosen": as_messages("a"), "rejected": as_messages("b")}, "the prompt is empty"),
    ("preference", PREFERENCE | {"prompt": []}, "the prompt is empty"),
    ("preference", PREFERENCE | {"chosen": 7}, "the field 'chosen' is a number, not a list of messages"),
    ("preference", PREFERENCE | {"rejected": {}}, "message 0 of the field 'rejected' has no role"),
    ("preference", PREFERENCE | {"rejected": [7]}, "the field 'rejected' holds a number where a message belongs"),
    ("preference", PREFERENCE | {"chosen": [message("bot", "a")]}, "message 0 has the role 'bot'"),
    ("preference", PREFERENCE | {"chosen": [message("assistant", None)]}, "message 0 has no content"),
    ("preference", PREFERENCE | {"chosen": "\u200b\ufeff "}, "a reply is empty"),
    ("preference", PREFERENCE | {"prompt": "\u200b"}, "the prompt is empty"),
    ("preference", PREFERENCE | {"rejected": "\ufeffIn France."}, "chosen and rejected are the same reply"),
    (
        "preference",
        PREFERENCE | {"prompt": [QUESTION, *as_messages("Sure,")]},
        "the prompt ends with the assistant: a reply that was begun cannot be trained on",
    ),
    (
        "preference",
        PREFERENCE | {"prompt": "<|im_start|>user\nWhere is Paris?<|im_end|>\n<|im_start|>assistant\n"},
        "message 0 is a conversation that was rendered already",
    ),
    (
        "preference",
        PREFERENCE | {"chosen": [message("user", "Other?"), *as_messages("a")]},
        "the prompt is not that of the replies' conversation",
    ),
    (
        "preference",
        PREFERENCE | {"prompt": "\n\nHuman: Where is Paris?"},
        "a prompt that is a transcript does not end with the assistant's open turn",
    ),
    ("preference", PREFERENCE | {"chosen": [QUESTION]}, "a conversation does not end with the assistant"),
    (
        "preference",
        {"chosen": [QUESTION, *as_messages("a")], "rejected": [message("user", "Hi"), *as_messages("b")]},
        "chosen and rejected answer different prompts: they differ in message 0",
    ),
    ("preference", {"chosen": "I'm sorry. No.", "rejected": "I'm sorry. Yes."}, "the field 'prompt' is missing"),
    ("preference", PREFERENCE | {"chosen": "Where is Paris?\nA", "rejected": "Where is Paris?\nB"}, SAID_AGAIN),
    ("preference", PREFERENCE | {"chosen": "[{'role': "}, WRITTEN),
    (
        "preference",
        PREFERENCE | {"chosen": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo"},
        "the field 'chosen' is rendered with a chat template, with its prompt",
    ),
    ("preference", PREFERENCE | {"images": ["a.png"]}, "the field 'images' holds what is no text"),
    ("preference/alone", {"chosen": "ab", "rejected": "bc"}, "the field 'prompt' is missing"),
    ("preference/alone", {"chosen": "a? ", "rejected": "a? b"}, "a reply is empty"),
    (
        "preference/alone",
        {"chosen": "USER: Hi there ASSISTANT: a", "rejected": "USER: Hi there ASSISTANT: b"},
        "the field 'prompt' is missing, and the replies hold a conversation that was rendered already",
    ),
    (
        "preference/alone",
        {"chosen": "The sky is\nblue, they say.", "rejected": "The sky is\nblack, they say."},
        "the field 'prompt' is missing, and the replies begin alike, so where the prompt ends is not known",
    ),
    ("sft/prompt", {"completion": "a"}, "the field 'prompt' is missing"),
    ("sft/prompt", {"prompt": "a", "completion": None}, "the field 'completion' is missing"),
    ("sft/prompt", {"prompt": "a", "completion": " "}, "a reply is empty"),
    ("sft", {"messages": as_messages("a")}, "the prompt is empty"),
    ("sft", {"messages": [QUESTION]}, "a conversation does not end with the assistant"),
    ("sft", {"messages": "Hi"}, "the field 'messages' is a text, not a list of messages"),
    ("sft", {"messages": [QUESTION, *as_messages(""), QUESTION, *as_messages("a")]}, "message 1 is empty"),
    (
        "sft",
        {"messages": [QUESTION, *as_messages("a"), {"role": "tool", "content": "22"}, *as_messages("b")]},
        "message 2 has the role 'tool'",
    ),
    (
        "sft",
        {"messages": [QUESTION, {"role": "assistant", "content": "a", "tool_calls": [{"name": "w"}]}]},
        "message 1 calls a tool (tool_calls)",
    ),
    (
        "sft",
        {"messages": [message("user", [{"type": "image_url", "image_url": {}}]), *as_messages("a")]},
        "message 0 holds a part that is no text: 'image_url'",
    ),
    (
        "sft/prompt",
        {"prompt": "a", "completion": "b", "label": "perhaps"},
        "the field 'label' is neither true nor false",
    ),
    (
        "sft/prompt",
        {"prompt": "a", "completion": "b", "label": False},
        "labelled as a reply that is not wanted, without one that is",
    ),
    (
        "sft",
        {"messages": [QUESTION, {"role": "assistant", "content": "a", "weight": 0}]},
        "the last reply is marked as one that is not trained on (weight 0, or train false)",
    ),
    ("samples", SAMPLE | {"prompt": None}, "the field 'prompt' is missing"),
    ("samples", SAMPLE | {"reply": ["b"]}, "the field 'reply' is not a text"),
    ("samples", SAMPLE | {"reply": " "}, "a reply is empty"),
    ("samples", SAMPLE | {"finish_reason": None}, "the field 'finish_reason' is missing"),
    ("samples", SAMPLE | {"prompt": " "}, "the prompt is empty"),
    ("hh", {"chosen": turn + " a"}, "the field 'rejected' is missing"),
    ("hh", {"chosen": turn + " a", "rejected": ["b"]}, "a transcript is not a text"),
    ("hh", {"chosen": turn + " a", "rejected": "b"}, "a transcript does not begin with a turn"),
    ("hh", {"chosen": turn + " a", "rejected": "So:" + turn + " b"}, "a transcript does not begin with a turn"),
    ("hh", {"chosen": turn + " a", "rejected": turn}, "a reply is empty"),
    ("hh", {"chosen": turn + " a", "rejected": turn + " a"}, "chosen and rejected are the same reply"),
    ("hh", {"chosen": turn + " a", "rejected": turn + turn + " b"}, "a turn of the prompt is empty"),
    (
        "hh",
        {"chosen": turn + " a", "rejected": "\n\nHuman: Yes\n\nAssistant: b"},
        "chosen and rejected answer different prompts: they differ in message 0",
    ),
    (
        "hh",
        {"chosen": turn + " a", "rejected": "\n\nHuman: Hi\nHuman: Ho\n\nAssistant: b"},
        "a turn holds the mark of another turn",
    ),
    (
        "hh",
        {"chosen": turn + " a", "rejected": turn + " a\n\nHuman: b"},
        "a conversation does not end with the assistant",
    ),
    ("hh", {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "the prompt is empty"),
    ("oasst", oasst("x", None, "Hi") | {"text": None}, "a message without message_id, role or text"),
    ("oasst", oasst("x", None, "Hi", deleted=True), "a deleted message"),
    ("oasst", oasst("x", ["q"], "Hi"), "a parent_id is not a text"),
    ("oasst", oasst("x", None, "Salut", lang="fr"), "not English"),
    ("oasst", oasst("x", None, "Hi"), "a question without a reply"),
    ("oasst", oasst("x", "b", "Are you sure?"), "a later turn of a conversation"),
]
GOOD = {
    "preference/alone": [{"chosen": "Why? So.", "rejected": "Why? No."}],
    "sft/prompt": [{"prompt": "Where is Paris?", "completion": "In France."}],
    "preference": [PREFERENCE],
    "sft": [{"messages": [QUESTION, *as_messages("In France.")]}],
    "samples": [SAMPLE],
    "hh": [HH],
    "oasst": OASST,
}


def test_samples_are_utility_data_without_an_end_where_they_ran_out_of_room(tmp_path, reset_tokenizer):
    """As `--mode=sample` writes them."""
    model = tiny.model(vocab_size=49152)
    asked = [Asked("Where is Oslo?"), Asked(({"role": "system", "content": "Be brief."}, QUESTION))]
    samples = tmp_path / "samples.jsonl"
    params = SamplingParams(max_new_tokens=4, temperature=1.0, n=3)
    write_samples(Sampler(model, reset_tokenizer, params), asked, samples)
    written = [json.loads(line) for line in samples.read_text().splitlines()]
    written[0]["finish_reason"] = "stop"
    rows, _ = sources.read(write(samples, written))
    assert [row.whole for row in rows] == [each["finish_reason"] == "stop" for each in written]
    assert {row.whole for row in rows} == {True, False} and len(rows) == 6
    assert [row.chosen for row in rows] == [tidy(each["reply"]) for each in written]
    assert rows[0].prompt == ({"role": "user", "content": "Where is Oslo?"},) and rows[5].prompt == asked[1].prompt
    assert not any(row.backtracks or row.rejected for row in rows)


@pytest.mark.parametrize(("format", "row", "reason"), REASONS, ids=[f"{case[0]}: {case[2]}" for case in REASONS])
def test_a_row_that_cannot_be_used_is_counted_under_its_reason(tmp_path, format, row, reason):
    name = format.partition("/")[0]
    rows, report = sources.read(write(tmp_path / "rows.jsonl", [*GOOD[format], row]), format=name)
    assert len(rows) == report.used == 1
    assert report.dropped == {reason: 1}
    if reason != "a later turn of a conversation":
        assert report.first[reason] == f"rows.jsonl, line {len(GOOD[format]) + 1}"
    assert report.lines()[0] == f"1 rows used, 1 dropped, read as {name}"
    assert report.lines()[-1].startswith(f"dropped 1: {reason} (first: ")


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([("a", None), ("b", None)], "replies without ranks"),
        ([("a", 0), ("b", float("nan"))], "a rank is not a number"),
        ([("a", 0), ("a", 1)], "chosen and rejected are the same reply"),
        ([(" ", 0), ("a", 1)], "a reply is empty"),
    ],
)
def test_an_oasst_question_with_bad_replies_is_counted(tmp_path, replies, reason):
    question = oasst("x", None, "Hi")
    bad = [oasst(f"x{number}", "x", text, rank) for number, (text, rank) in enumerate(replies)]
    rows, report = sources.read(write(tmp_path / "rows.jsonl", [*OASST, question, *bad]), utility=True)
    assert len(rows) == 1
    assert report.dropped == {reason: 1}


def test_a_line_that_is_not_utf8_is_one_dropped_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(PREFERENCE).encode()
    path.write_bytes(good + b'\n{"prompt": "caf\xe9"}\n' + good + b"\n")
    rows, report = sources.read(str(path))
    assert len(rows) == 2
    assert report.dropped == {"not JSON": 1}


# -------------------------------------------------------------------------------------------- refused sources


@pytest.mark.parametrize(
    ("name", "rows", "problem"),
    [
        ("rows.jsonl", [], "has no rows"),
        ("rows.jsonl", ["broken"], "has no rows that are objects: .*dropped 1: not JSON"),
        ("rows.jsonl", [PREFERENCE | {"chosen": ""}], r"gives no usable row: .*a reply is empty \(first: .*, line 1"),
        ("rows.jsonl", [{"question": "a", "answer": "b"}], "the columns answer, question are none of a known format"),
    ],
)
def test_a_file_without_usable_rows_is_refused(tmp_path, name, rows, problem):
    with pytest.raises(InputError, match=problem):
        sources.read(write(tmp_path / name, rows))


def test_a_damaged_gzip_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps([PREFERENCE] * 99).encode())[:50])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz cannot be read"):
        sources.read(str(tmp_path / "rows.jsonl.gz"))


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="'prefrence': did you mean 'preference'"):
        sources.read(write(tmp_path / "rows.jsonl", [PREFERENCE]), format="prefrence")


@pytest.mark.parametrize(
    "path",
    ["{tmp}/missing.jsonl", "data/missing.parquet", "data/missing.jsonl.XZ", "./missing", "~/missing", "testbad"],
)
def test_a_missing_file_is_refused(tmp_path, path):
    with pytest.raises(InputError, match="is no file or folder here"):
        sources.read(path.replace("{tmp}", str(tmp_path)))


# -------------------------------------------------------------------------------------------------- real data


def raw(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["hh-rlhf/harmless-base.jsonl.gz", "safety-pairs/jailbreakbench-llamaguard2.jsonl.gz"])
def test_all_rows_of_the_real_pairs_are_accounted_for(shared, name):
    path = shared / "data" / name
    rows, report = sources.read(str(path))
    given = raw(path)
    assert len(rows) == report.used
    assert report.used + report.dropped.total() == len(given)
    assert report.used > 0.95 * len(given)
    assert all(row.prompt[-1]["role"] == "user" and row.chosen != row.rejected for row in rows)
    lines = {row.origin: row for row in rows}
    for number, source in enumerate(given, start=1):
        row = lines.get(f"{path.name}, line {number}")
        if row and isinstance(source["chosen"], str):
            assert source["chosen"].strip().endswith(row.chosen) and source["rejected"].strip().endswith(row.rejected)


def test_all_messages_of_the_real_oasst_are_accounted_for(shared):
    path = shared / "data/oasst/messages.jsonl.gz"
    rows, report = sources.read(str(path), utility=True)
    messages = raw(path)
    questions = {message["message_id"] for message in messages if message["parent_id"] is None}
    replies = [message for message in messages if message["parent_id"] in questions]
    assert len(rows) == report.used
    assert report.used + report.dropped.total() + len(replies) == len(messages)
    assert report.used > 0.9 * len(questions)
    best = {message["text"].strip() for message in replies if message["rank"] in (0, None)}
    assert all(row.chosen in best for row in rows)


def test_nothing_of_the_testbed_is_taken_back_as_utility_data():
    assert not any(preference.backtracks for preference in sources.read("testbed", utility=True, limit=8)[0])


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    """A small .gz file can hold gigabytes of one line."""
    monkeypatch.setattr(text_files, "_LONGEST_LINE", 1000)
    long = PREFERENCE | {"chosen": "a" * 5000}
    exact = json.dumps(PREFERENCE | {"chosen": "b"})
    exact = exact.replace('"b"', '"' + "b" * (1000 - len(exact)) + '"')
    path = write(tmp_path / "rows.jsonl.gz", [PREFERENCE, long, exact, long])
    rows, report = sources.read(path)
    assert [row.origin for row in rows] == ["rows.jsonl.gz, line 1", "rows.jsonl.gz, line 3"]
    assert report.dropped == {"a line of more than 0 MiB": 2}
    with gzip.open(path) as file:
        assert max(map(len, text_files._lines(file))) <= 1001


@pytest.mark.parametrize("depth", range(900, 1000, 5))
def test_deep_nesting_is_counted(tmp_path, depth):
    """json reads it up to a depth at which Python can no longer write it."""
    row = json.dumps(PREFERENCE).replace('"Where is Paris?"', "[" * depth + "]" * depth)
    _, report = sources.read(write(tmp_path / "rows.jsonl", [PREFERENCE, row]))
    assert report.dropped.total() == 1


@pytest.mark.parametrize("path", ["x" * 300 + ".jsonl", "a\0b.jsonl", "~nobody_of_this_name/rows.jsonl"])
def test_a_path_that_cannot_be_looked_at_is_named(path):
    with pytest.raises(InputError, match="is no file or folder here"):
        sources.read(path)
