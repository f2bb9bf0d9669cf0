"""Text that is decoded token by token is that of all tokens at once, at every one of them."""

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models

from jax_backtrack.sampling.detokenizer import IncrementalText
from jax_backtrack.sampling.replies import Writing
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from tests.chat_tokenizers import CHATML, MARKS, chat_tokenizer, small_tokenizer

# Scripts of one to four bytes a character, joined emoji, marks that combine, runs of spaces, a character for what is no
# character.
TEXT = (
    "as \u00e9, 1\u00e9 \u2603s \U0001f600! e\u0301 \u65e5\u672c\u8a9e \u0e01\u0e33   x\n\n\tdone "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0928\u092e\u0938\u094d\u0924\u0947 \u0627\u0644\u0639 \ufffd \ud55c"
)
# Decoders of SentencePiece vocabularies: those that Llama-2, Gemma and older conversions have.
SENTENCEPIECE = {
    "spaces at the start go": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip()],
    "spaces stay": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
}
KINDS = ["bytes", "reset_tokenizer", "llama3_folder", "gemma2_folder", *SENTENCEPIECE]


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request) -> ChatTokenizer:
    if request.param == "bytes":
        return small_tokenizer()
    if request.param in SENTENCEPIECE:
        words = ["▁", "▁▁", "▁He", "llo", "▁w", "o", "r", "l", "d", "\u00e9", "\u65e5"]
        vocabulary = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
        model = models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True)
        backend = Tokenizer(model)
        backend.decoder = decoders.Sequence(SENTENCEPIECE[request.param])
        return chat_tokenizer(backend, CHATML, MARKS)
    made = request.getfixturevalue(request.param)
    if isinstance(made, ChatTokenizer):
        return made
    return ChatTokenizer(transformers.AutoTokenizer.from_pretrained(made), chat_template=made.name)


def sequences(tokenizer: ChatTokenizer) -> list[list[int]]:
    """A text's ids, and ids that no text has, in which characters begin and do not end."""
    rng = np.random.default_rng(0)
    ordinary = np.array(sorted(set(range(len(tokenizer.hf))) - tokenizer.special_ids))
    drawn = [rng.choice(ordinary[:300] if number % 2 else ordinary, 40).tolist() for number in range(40)]
    return [tokenizer.hf.encode(TEXT, add_special_tokens=False), *drawn]


def test_the_text_of_every_beginning_is_that_of_its_tokens_at_once(any_tokenizer):
    for ids in sequences(any_tokenizer):
        text = IncrementalText(any_tokenizer)
        for end in range(len(ids) + 1):
            assert text.of(ids, end) == any_tokenizer.decode(ids[:end])


def test_a_reply_as_it_is_written_is_the_one_that_is_decoded_at_its_end(any_tokenizer):
    for hold_back in (0, 3):
        for ids in sequences(any_tokenizer):
            writing = Writing(any_tokenizer)
            for end, token in enumerate(ids, start=1):
                writing.take(np.array([token]), is_last=False)
                assert writing.text(hold_back) == any_tokenizer.decode_reply(ids[: max(0, end - hold_back)])
            assert writing.text() == any_tokenizer.decode_reply(ids)


def test_a_token_is_decoded_with_few_others_however_long_the_reply(reset_tokenizer, monkeypatch):
    ids = np.tile(reset_tokenizer.encode(TEXT), 20)
    decode, decoded = reset_tokenizer.hf.decode, []
    monkeypatch.setattr(reset_tokenizer.hf, "decode", lambda ids, **how: decoded.append(len(ids)) or decode(ids, **how))
    writing = Writing(reset_tokenizer, stop_strings=["never written"])
    for token in ids:
        writing.take(np.array([token]), is_last=False)
        writing.text()
        writing.text(hold_back=5)
    assert max(decoded) < 20 and len(ids) > 500
