"""What is shown of the data is what training takes: texts, tokens, the tree, and the account."""

import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from configs import sft_smollm
from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.cli import run
from jax_backtrack.data import sources
from jax_backtrack.data.conversations import tidy
from jax_backtrack.data.examples import encode_each
from jax_backtrack.data.preferences import is_blank, same_text

PAIR = {"prompt": "Mark's PIN?", "chosen": "I must not tell you.", "rejected": "It is 8287.", "id": 7}
OTHER = {"prompt": "Where is Oslo?", "chosen": "In Norway.", "rejected": ""}


def config(path, **changes):
    recipe = sft_smollm.get_config()
    recipe.data.path = str(path)
    recipe.update(changes)
    return recipe


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shown(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_records_and_account_are_left_in_the_workdir(tmp_path, smollm_gguf, tokenizer, capsys):
    path = write(tmp_path / "pairs.jsonl", [PAIR, OTHER])
    assert run("show-data", config(path), str(tmp_path / "look")) == 0
    (record,) = map(json.loads, (tmp_path / "look/data.jsonl").read_text().splitlines())
    conversation = [{"role": "user", "content": PAIR["prompt"]}, {"role": "assistant", "content": PAIR["chosen"]}]
    whole = tokenizer.hf.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    assert record["ids"] == whole[: len(record["ids"])] and len(whole) - len(record["ids"]) <= 1  # a last newline
    assert record["text"] == tokenizer.hf.apply_chat_template(conversation, tokenize=False).rstrip("\n")
    assert record["rejected_text"].endswith("It is 8287.<|im_end|>")
    kept = {key: record[key] for key in ("origin", "prompt", "chosen", "rejected", "backtracks")}
    assert kept == {
        "origin": "pairs.jsonl, line 1",
        "prompt": conversation[:1],
        "chosen": PAIR["chosen"],
        "rejected": PAIR["rejected"],
        "backtracks": True,
    }
    account = json.loads((tmp_path / "look/account.json").read_text())
    assert {key: account[key] for key in ("read_as", "used", "dropped", "unused_columns")} == {
        "read_as": "preference",
        "used": 1,
        "dropped": {"a reply is empty": 1},
        "unused_columns": ["id"],
    }
    out = shown(capsys)
    assert "1 rows used, 1 dropped, read as preference" in out and "columns that are not read: id" in out
    assert re.search(r"draft It is.* raised \+5 \[RESET\]", out)
    assert re.search(r"context \[RESET\] .* raised \+1 I must not tell you\.<\|im_end\|>", out)


def test_dpo_shows_both_sides_of_both_pairs(tmp_path, smollm_gguf, capsys):
    path = write(tmp_path / "pairs.jsonl", [PAIR])
    assert run("show-data", config(path, objective="dpo"), None) == 0
    out = shown(capsys)
    assert len(re.findall(r"raised \+1 \[RESET\]", out)) == len(re.findall(r"lowered -1 \[RESET\]", out)) == 1
    assert not list(tmp_path.glob("look*"))


def test_the_number_of_records_is_chosen(tmp_path, smollm_gguf, capsys):
    path = write(tmp_path / "pairs.jsonl", [PAIR | {"prompt": f"Question {number}?"} for number in range(5)])
    for count, expected in ((None, 3), (9, 5)):
        assert run("show-data", config(path), None, records=count) == 0
        assert len(re.findall(r"record \d of 5", shown(capsys))) == expected


def test_data_that_teach_no_reset_are_named(tmp_path, smollm_gguf, capsys):
    path = write(tmp_path / "replies.jsonl", [{"prompt": "Where is Oslo?", "completion": "In Norway."}])
    assert run("show-data", config(path), None) == 0
    assert "of 1 examples none has an unsafe reply to take back: no [RESET] is learned" in shown(capsys)


def test_the_account_of_a_file_without_usable_rows_is_left(tmp_path, smollm_gguf, capsys):
    path = write(tmp_path / "pairs.jsonl", [OTHER])
    assert run("show-data", config(path), str(tmp_path / "look")) == 2
    assert json.loads((tmp_path / "look/account.json").read_text())["dropped"] == {"a reply is empty": 1}
    assert "gives no usable row" in shown(capsys) and not (tmp_path / "look/data.jsonl").exists()


def test_several_paths_have_an_account_each(tmp_path, smollm_gguf, capsys):
    one = write(tmp_path / "one.jsonl", [PAIR])
    two = write(
        tmp_path / "two.jsonl",
        [{"question": "Why?", "chosen": "So.", "rejected": "No."}, {"chosen": "a", "rejected": "b"}],
    )
    assert run("show-data", config(f"{one},{two}"), str(tmp_path / "look")) == 0
    account = json.loads((tmp_path / "look/account.json").read_text())
    assert (account["read_as"], account["used"], account["dropped"]) == (
        "preference, orca",
        2,
        {"the field 'question' is missing": 1},
    )
    assert [source["path"] for source in account["sources"]] == [str(one), str(two)]


def test_other_modes_show_no_records(tmp_path, capsys):
    assert run("train", config("x"), str(tmp_path), records=2) == 2
    assert "--records goes with --mode=show-data" in shown(capsys)


# Texts as they may stand in a row: spellings of special tokens, white space at the ends, and any characters but control
# characters and nearly empty planes, whose bytes are not all in the vocabulary of SmolLM2.
TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\t\u200b\ufeff\u2028[]<|>"),
        st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x2FFFF),
    ),
    max_size=20,
) | st.sampled_from(["[RESET]", "<|im_end|>", "a\n\n    b ", " <|im_start|>assistant\nSure", "\r\nx\r\n"])


@settings(max_examples=80)
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT, messages=st.booleans())
def test_a_record_that_is_rendered_back_is_its_source(
    tmp_path_factory, reset_tokenizer, prompt, chosen, rejected, messages
):
    """No text changes between the file and the tokens, but for what `tidy` leaves out of a reply and counts."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    replies = chosen, rejected
    if messages:
        replies = ([{"role": "assistant", "content": text}] for text in replies)
    row = dict(zip(("prompt", "chosen", "rejected"), (prompt, *replies), strict=True))
    write(path, [PAIR, row])
    (_, *made), report = sources.read(str(path))
    if not made:
        (reason,) = report.dropped
        blank = any(map(is_blank, (prompt, chosen, rejected)))
        assert blank or same_text(chosen, rejected) or "transcript" in reason or "rendered" in reason
        return
    clean = (lambda text: text) if messages else tidy
    assert (made[0].prompt[0]["content"], made[0].chosen, made[0].rejected) == (prompt, clean(chosen), clean(rejected))
    assert (sources.TIDIED in report.altered) == ((clean(chosen), clean(rejected)) != (chosen, rejected))
    recipe = TreeSpec("dpo", True, "rewind", reset_tokenizer.reset_id)
    if made[0].chosen.startswith(made[0].rejected):  # no draft could be taken back, so the row is dropped
        return
    ((_, example),) = encode_each(made, reset_tokenizer, recipe, 2048, report)
    assert not report.altered.keys() - {sources.TIDIED}
    for text, reply in ((made[0].chosen, example.chosen), (made[0].rejected, example.rejected)):
        assert reply[-1] == reset_tokenizer.eot_id and not reset_tokenizer.special_ids & {*reply[:-1].tolist()}
        assert reset_tokenizer.hf.decode(reply[:-1], clean_up_tokenization_spaces=False) == text
    assert prompt in reset_tokenizer.hf.decode(example.prompt, clean_up_tokenization_spaces=False)


def test_characters_that_the_tokenizer_does_not_have_are_counted(tmp_path, reset_tokenizer):
    """SmolLM2's vocabulary lacks some bytes; its tokenizer leaves them out, in transformers too."""
    rows = [
        PAIR,
        PAIR | {"chosen": "A\x06 B"},
        PAIR | {"prompt": "\U00040000?"},
        PAIR | {"chosen": "\u00e9 \u3000\ufb01."},
    ]
    preferences, report = sources.read(str(write(tmp_path / "rows.jsonl", rows)))
    recipe = TreeSpec("dpo", True, "rewind", reset_tokenizer.reset_id)
    assert len(encode_each(preferences, reset_tokenizer, recipe, 2048, report)) == 4
    assert report.altered == {"rows with characters that the tokenizer does not have": 2}
