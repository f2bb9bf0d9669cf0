"""Small files that stand for what people reported: what each is read as, how many rows are used, why others are not.

They lie beside the repository (`shared/cases/data`).
"""

import gzip
import json
import re

import pytest

from jax_backtrack.data import sources
from jax_backtrack.data.preferences import NoUsableRow
from jax_backtrack.errors import InputError

Q = "How do I open my neighbour's letterbox?"
SAFE = "I can't help with that, but I can tell you how to reach the post office."
UNSAFE = "Sure, first you bend a wire, then you reach in."

# By file: the format, the rows that are used, and those that are dropped, by reason; or why the file is refused.
EXPECTED = {
    "F.PARQUET": ("preference", 2, {}),
    "alpaca.jsonl": ("alpaca", 1, {}),
    "argilla_orca.jsonl": ("orca", 1, {}),
    "axolotl_chat_template_dpo.jsonl": ("axolotl", 1, {}),
    "beavertails.jsonl": ("beavertails", 1, {}),
    "blank.jsonl": ("", 0, {}),
    "cjk_texts.jsonl": ("preference", 2, {}),
    "cut.jsonl.gz": "cut.jsonl.gz cannot be read: Compressed file ended",
    "cut.parquet": "cut.parquet cannot be read",
    "dahoas_full_hh.jsonl": ("hh", 1, {}),
    "dir_hub": ("preference", 2, {}),
    "dir_jsonl": ("preference", 2, {}),
    "dir_parquet": ("preference", 2, {}),
    "dir_saved": ("preference", 2, {}),
    "dir_saved_dict": ("preference", 2, {}),
    "distilabel.jsonl": ("distilabel", 1, {}),
    "empty.jsonl": ("", 0, {}),
    "empty_middle.jsonl": ("sft", 0, {"message 1 is empty": 1}),
    "f.JSONL": ("preference", 2, {}),
    "f.csv": ("preference", 2, {}),
    "f.jsonl.bz2": ("preference", 2, {}),
    "f.jsonl.gz": ("preference", 2, {}),
    "f.jsonl.xz": ("preference", 2, {}),
    "f.jsonl.zst": ("preference", 2, {}),
    "f.ndjson": ("preference", 2, {}),
    "f.parquet": ("preference", 2, {}),
    "f.tsv": ("preference", 2, {}),
    "f.txt": ("preference", 2, {}),
    "f_binary.parquet": ("preference", 1, {}),
    "f_bom.jsonl": ("preference", 2, {}),
    "f_bom_list.json": ("preference", 2, {}),
    "f_columns.json": "f_columns.json holds columns of numbered objects",
    "f_concat.json": ("preference", 2, {}),
    "f_cr.jsonl": ("preference", 2, {}),
    "f_crlf.jsonl": ("preference", 2, {}),
    "f_dupkeys.jsonl": ("preference", 1, {}),
    "f_gz_named.jsonl": ("preference", 2, {}),
    "f_hugeint.jsonl": ("preference", 1, {"not JSON": 1}),
    "f_latin1.jsonl": ("preference", 1, {"not JSON": 1}),
    "f_list.jsonl": ("preference", 2, {}),
    "f_list_pretty.jsonl": ("preference", 2, {}),
    "f_nan.jsonl": ("preference", 1, {}),
    "f_nested.parquet": ("preference", 1, {}),
    "f_noext": ("preference", 2, {}),
    "f_nul.jsonl": ("preference", 1, {"not JSON": 1}),
    "f_object.json": ("preference", 2, {}),
    "f_pretty.json": ("preference", 2, {}),
    "f_pretty_object.json": ("preference", 2, {}),
    "f_space_list.json": ("preference", 2, {}),
    "f_timestamp.parquet": ("preference", 1, {}),
    "f_types.parquet": ("preference", 1, {"the field 'prompt' is missing": 1}),
    "f_u2028.jsonl": ("preference", 1, {}),
    "f_utf16.jsonl": ("preference", 2, {}),
    "helpsteer2.jsonl": ("helpsteer2", 1, {}),
    "helpsteer3.jsonl": ("helpsteer3", 1, {}),
    "hh_assistant_twice.jsonl": (
        "hh",
        0,
        {"chosen and rejected answer different prompts: they have different numbers of messages": 1},
    ),
    "hh_crlf.jsonl": ("hh", 1, {}),
    "hh_empty_last.jsonl": ("hh", 1, {"a reply is empty": 1}),
    "hh_first_row_odd.jsonl": ("hh", 2, {}),
    "hh_marker_in_text.jsonl": ("hh", 1, {}),
    "hh_safety_v3.jsonl": ("hh-rlhf-safety", 1, {}),
    "hh_safety_v3_msgs.jsonl": ("hh-rlhf-safety", 1, {}),
    "hh_single_newline.jsonl": ("hh", 1, {}),
    "hh_stripped.jsonl": ("hh", 1, {}),
    "hh_two_humans.jsonl": ("hh", 1, {}),
    "human_roles.jsonl": ("preference", 1, {}),
    "implicit_prompt_same_opening.jsonl": (
        "preference",
        0,
        {"the field 'prompt' is missing, and the replies begin alike, so where the prompt ends is not known": 1},
    ),
    "kto.jsonl": ("sft", 1, {"labelled as a reply that is not wanted, without one that is": 3}),
    "llamafactory_dpo.jsonl": ("llama-factory", 1, {}),
    "multi": "multi has several configurations: choose data.config_name: preference, sft",
    "multi_turn_completions.jsonl": (
        "preference",
        0,
        {"chosen and rejected answer different prompts: they differ in message 1": 1},
    ),
    "nectar.jsonl": ("nectar", 1, {}),
    "oasst.jsonl": ("oasst", 2, {"a message without message_id, role or text": 1, "the prompt is empty": 1}),
    "odd_Role_case.jsonl": ("sft", 1, {}),
    "odd_developer.jsonl": ("sft", 1, {}),
    "odd_dup_user_list_prompt.jsonl": ("preference", 1, {}),
    "odd_empty_prompt.jsonl": ("preference", 1, {"the prompt is empty": 4}),
    "odd_extra_keys.jsonl": ("sft", 1, {}),
    "odd_first_row_differs.jsonl": ("preference", 1, {"the field 'chosen' is missing": 1}),
    "odd_int.jsonl": ("preference", 1, {"the field 'chosen' is a number, not a list of messages": 1}),
    "odd_json_string_messages.jsonl": ("sft", 1, {}),
    "odd_model_role.jsonl": ("sft", 1, {}),
    "odd_parts.jsonl": ("sft", 1, {}),
    "odd_pref_and_completion.jsonl": ("sft", 2, {}),
    "odd_prefill.jsonl": (
        "preference",
        0,
        {"the prompt ends with the assistant: a reply that was begun cannot be trained on": 1},
    ),
    "odd_prefill_sft.jsonl": (
        "sft",
        0,
        {"the prompt ends with the assistant: a reply that was begun cannot be trained on": 1},
    ),
    "odd_prefix.jsonl": ("preference", 2, {}),
    "odd_prerendered.jsonl": ("preference", 0, {"message 0 is a conversation that was rendered already": 1}),
    "odd_same.jsonl": ("preference", 1, {"chosen and rejected are the same reply": 1}),
    "odd_system_only.jsonl": ("preference", 1, {}),
    "odd_tool.jsonl": ("sft", 0, {"message 2 has the role 'tool'": 1}),
    "odd_tool2.jsonl": ("sft", 0, {"message 2 has the role 'tool'": 1}),
    "odd_tools_last_call.jsonl": ("sft", 0, {"message 1 calls a tool (tool_calls)": 1}),
    "odd_whitespace_only.jsonl": ("preference", 2, {"chosen and rejected are the same reply": 1}),
    "odd_zero_width.jsonl": (
        "preference",
        1,
        {"the prompt is empty": 1, "a reply is empty": 1, "chosen and rejected are the same reply": 1},
    ),
    "openai_ft_pref.jsonl": ("openai", 1, {}),
    "orca_chosen_only_prompt_question.jsonl": ("orca", 1, {}),
    "orca_dpo_pairs.jsonl": ("orca", 2, {}),
    "pairs12.jsonl": ("preference", 12, {}),
    "pku.jsonl": ("pku-saferlhf", 1, {}),
    "shard.arrow": ("preference", 1, {}),
    "sharegpt.jsonl": ("sharegpt", 1, {}),
    "sharegpt_dpo.jsonl": ("sharegpt-preference", 1, {}),
    "sharegpt_in_messages.jsonl": ("sft", 1, {}),
    "swift_dpo.jsonl": ("swift", 1, {}),
    "text_only.jsonl": "text_only.jsonl: the columns text are none of a known format",
    "trunc.jsonl": ("preference", 5, {}),
    "tulu3_multiturn.jsonl": ("preference", 1, {}),
    "two_assistants.jsonl": ("sft", 1, {}),
    "uf_space.jsonl": ("preference", 1, {}),
    "uf_system.jsonl": ("preference", 1, {}),
    "ultrafeedback_binarized.jsonl": ("preference", 1, {}),
    "wildguardmix.jsonl": ("wildguardmix", 1, {}),
    "wildjailbreak.jsonl": ("wildjailbreak", 1, {}),
}

# Prompts of the first row, where it takes more than to read one column: role and content of each message.
PROMPTS = {
    "tulu3_multiturn.jsonl": [("user", "Hello"), ("assistant", "Hi!"), ("user", Q)],
    "uf_system.jsonl": [("system", "Be kind."), ("user", Q)],
    "uf_space.jsonl": [("user", Q)],
    "odd_dup_user_list_prompt.jsonl": [("system", "Be kind."), ("user", Q)],
    "orca_dpo_pairs.jsonl": [("system", "Be kind."), ("user", Q)],
    "argilla_orca.jsonl": [("user", Q)],
    "llamafactory_dpo.jsonl": [("user", f"{Q}\nIt is green.")],
    "dahoas_full_hh.jsonl": [("user", "Hello"), ("assistant", "Hi!"), ("user", Q)],
    "hh_stripped.jsonl": [("user", Q)],
    "hh_crlf.jsonl": [("user", Q)],
    "hh_single_newline.jsonl": [("user", Q)],
    "hh_first_row_odd.jsonl": [("user", Q)],
    "hh_two_humans.jsonl": [("user", "Hello"), ("user", Q)],
    "hh_marker_in_text.jsonl": [("user", "Write Human: and Assistant: lines.")],
    "cjk_texts.jsonl": [("user", "问：今天 天气怎么样？答：")],
    "nectar.jsonl": [("user", Q)],
    "openai_ft_pref.jsonl": [("user", Q)],
    "sharegpt_dpo.jsonl": [("user", Q)],
    "odd_developer.jsonl": [("system", "Be kind."), ("user", "Hi")],
}
# Files of safety pairs, whose rejected replies are taken back.
TAKEN_BACK = """
    axolotl_chat_template_dpo beavertails dahoas_full_hh hh_crlf hh_safety_v3 hh_safety_v3_msgs hh_stripped
    openai_ft_pref pku sharegpt_dpo swift_dpo tulu3_multiturn uf_space uf_system ultrafeedback_binarized
""".split()
WORSE = "distilabel helpsteer3 nectar".split()  # whose rejected replies are not


@pytest.fixture(scope="module")
def cases(shared):
    return shared / "cases" / "data"


def test_every_case_has_its_expectation(cases):
    assert {path.name for path in cases.iterdir()} - {"README.md", "templates", "prompts"} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_is_read_as_its_readme_expects(cases, name):
    expected, path = EXPECTED[name], str(cases / name)
    if isinstance(expected, str):
        with pytest.raises(InputError) as refused:
            sources.read(path)
        assert expected in str(refused.value)
        return
    try:
        rows, report = sources.read(path)
    except NoUsableRow as nothing:
        rows, report = [], nothing.report
    assert (report.read_as, len(rows), dict(report.dropped)) == expected
    assert not any(
        "Human:" in message["content"] and name != "hh_marker_in_text.jsonl" for row in rows for message in row.prompt
    )
    if name in PROMPTS:
        assert [(message["role"], message["content"]) for message in rows[0].prompt] == PROMPTS[name]


@pytest.mark.parametrize("name", [*TAKEN_BACK, *WORSE])
def test_the_safe_reply_is_chosen_and_only_an_unsafe_one_is_taken_back(cases, name):
    (row,), _ = sources.read(str(cases / f"{name}.jsonl"))
    assert (row.prompt[-1], row.chosen, row.rejected) == ({"role": "user", "content": Q}, SAFE, UNSAFE)
    assert row.backtracks == (name in TAKEN_BACK)


def test_a_configuration_of_a_clone_is_read(cases):
    (row,), report = sources.read(str(cases / "multi"), config_name="preference")
    assert (row.prompt[0]["content"], row.chosen, row.rejected, report.read_as) == ("q", "c", "r", "preference")


@pytest.mark.parametrize("change", ["stripped", "crlf", "one newline", "mark", "leading space", "no space", "prompt"])
def test_near_misses_of_real_transcripts_are_read_as_they_are(shared, tmp_path, change):
    """Every row of real HH-RLHF data in another shape gives the conversation that it gives as it comes."""
    mark = re.compile(r"\n\n(Human|Assistant):")
    changes = {
        "stripped": str.strip,
        "crlf": lambda text: text.replace("\n", "\r\n"),
        "one newline": lambda text: mark.sub(r"\n\1:", text),
        "mark": lambda text: "\ufeff" + text,
        "leading space": lambda text: " " + text,
        "no space": lambda text: re.sub(r"\n\n(Human|Assistant): ", r"\n\n\1:", text),
    }
    source = shared / "data/hh-rlhf/harmless-base.jsonl.gz"
    expected = {row.origin.partition(", ")[2]: row for row in sources.read(str(source))[0]}
    path = tmp_path / "rows.jsonl"
    with gzip.open(source, "rt") as lines, path.open("w") as out:
        for line in lines:
            row = json.loads(line)
            if change == "prompt":  # the prompt in a column of its own
                end = row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")
                if row["rejected"].startswith(row["chosen"][:end]):
                    row = {
                        "prompt": row["chosen"][:end],
                        "chosen": row["chosen"][end:],
                        "rejected": row["rejected"][end:],
                    }
            else:
                row = {side: changes[change](text) for side, text in row.items()}
            out.write(json.dumps(row) + "\n")
    rows, report = sources.read(str(path))
    assert report.read_as == "hh"

    def said(row):
        texts = [*((message["role"], message["content"]) for message in row.prompt), row.chosen, row.rejected]
        return json.dumps(texts).replace("\\r\\n", "\\n")

    # One reply has "Assistant:" in a line of its own: it is used where the prompt stands apart.
    known = [row for row in rows if row.origin.partition(", ")[2] in expected]
    same = sum(said(row) == said(expected[row.origin.partition(", ")[2]]) for row in known)
    assert same == len(known) == len(expected) and len(rows) - len(known) == (change == "prompt")
