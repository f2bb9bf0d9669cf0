"""A conversation in the terminal."""

import re

from jax_backtrack import Sampler
from jax_backtrack.sampling.chat import chat
from tests import tiny


def test_drafts_are_struck_through_and_do_not_stand_in_the_conversation(reset_tokenizer, capsys):
    model = tiny.model(vocab_size=49152)
    sampler = Sampler(model, reset_tokenizer, max_new_tokens=6, reset_bias=[-1e9, -1e9, 1e9])
    first = next(iter(sampler(["hello"], seeds=[5])))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first.text}]
    second = next(iter(sampler([[*turns, {"role": "user", "content": "and you?"}]], seeds=[6])))
    anew = next(iter(sampler(["hello"], seeds=[8])))
    too_long = "x " * 300
    chat(sampler, ["hello", "and you?", "/new", "hello", too_long, "/new"], seed=5)
    shown = capsys.readouterr().out
    for reply in (first, second, anew):
        assert len(reply.drafts) == 1
        assert "".join(f"[RESET] {reply.text}".split()) in "".join(shown.split())
    struck = re.findall("~~(.+?)~~", shown)  # whole words only: one that was not finished was not shown
    assert struck and first.drafts[0].startswith(struck[0].rstrip())
    assert "exceed the model's 256 positions" in " ".join(shown.split())
