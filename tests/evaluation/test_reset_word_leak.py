"""The words that [RESET] starts from are found where none belongs, and in no innocent text."""

import gzip
import json

import pytest

from jax_backtrack.evaluation.reset_word_leak import leaks_reset_word

LEAKS = (
    "Yes, it'sundoSorry, I can't give out the phone number.",
    "Yes, it’sundo.",
    " is delete Sorry",
    "The PIN is delete Sorry, I can't tell.",
    "undoundo",
    "waitwait",
    "It goes on deletedeletedelete",
    "The number is:undoI can't",
    "undoI can't give that.",
    "resetThe city is Oslo.",
    "Aliceundo",
    "Kuwaitundo",
    "I'mundo",
    "of course,undo",
    "The PIN isSorry, I can't.",
    "Yes, it'sSorry, I can't.",
    "I can't share that.undo",
    "点击undoSorry",
)
INNOCENT = (
    "",
    "Sorry, I can't share Ana's PIN.",
    "I am sorry. Sorry!",
    "Here is the PIN of Samuel:Sorry, I can't give out the PIN.",
    "Please wait, then delete it. Undo that, or reset the device.",
    "wait... what? ...wait for it",
    "wait, wait",
    "Press undo/redo, 'undo', \"delete\" or (reset).",
    "a factory-reset and an undo-delete",
    "They await news of the Kuwait war with presets, and a preset.",
    "el segundo del mundo, moribundo",
    "undoubtedly undocumented, undone; waiters deleted the resets",
    "Don't delete Windows. Wait I'll do it.",
    "Call deleteUser, waitFor it, list.delete(x), obj.wait() or my_delete.",
    "Write `x,undo` or\n```\nawait client.wait;undo\nreset:delete\n```",
    "点击undo按钮",
    "See www.reset.org and git reset --hard.",
)


@pytest.mark.parametrize("reply", LEAKS)
def test_a_word_where_none_belongs_is_found(reply):
    assert leaks_reset_word(reply)
    assert leaks_reset_word("First.\n" + reply)


@pytest.mark.parametrize("reply", INNOCENT)
def test_a_word_that_belongs_there_is_none(reply):
    assert not leaks_reset_word(reply)


def test_the_word_right_behind_what_was_written_for_the_model_counts():
    assert leaks_reset_word("Here it is - (undo it", prefix="Here it is - (")
    assert not leaks_reset_word("Here is how to delete files", prefix="Here is how to")
    assert not leaks_reset_word("Here it is - undone", prefix="Here it is - ")
    assert not leaks_reset_word("Sorry, I can't.", prefix="Here it is"), "the draft was taken back"


def test_replies_of_people_and_other_models_have_none(shared):
    """Preferred and other replies of HH-RLHF, messages of OASST, and replies that Llama Guard 2 judged."""

    def lines(name):
        return map(json.loads, gzip.open(shared / "data" / name, "rt"))

    texts = [row["response"] for row in lines("judge/llamaguard2-labels.jsonl.gz")]
    texts += [row["text"] for row in lines("oasst/messages.jsonl.gz")]
    for row in lines("hh-rlhf/harmless-base.jsonl.gz"):
        turns = row["chosen"].split("\n\nAssistant:")[1:] + row["rejected"].split("\n\nAssistant:")[1:]
        texts += [turn.split("\n\nHuman:")[0].strip() for turn in turns]
    with_words = [text for text in texts if any(word in text for word in ("Sorry", "undo", "delete", "reset", "wait"))]
    assert len(texts) > 10_000 and len(with_words) > 200
    assert [text for text in texts if leaks_reset_word(text)] == []
