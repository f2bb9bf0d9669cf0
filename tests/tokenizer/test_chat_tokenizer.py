"""Conversations become the ids that the model's own template gives, and no text can become a special token."""

import functools
import gzip
import json

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import _open_tokenizer, load
from jax_backtrack.tokenizer.chat_tokenizer import RESET, ChatTokenizer, with_reset
from tests import tiny
from tests.chat_tokenizers import CHATML, MARKS, by_transformers, chat_tokenizer, conversation, small_tokenizer


def special_tokens(tokenizer: ChatTokenizer) -> dict[str, int]:
    return {token.content: index for index, token in tokenizer.hf.added_tokens_decoder.items()}


def special_ids_in(tokenizer: ChatTokenizer, ids) -> list[int]:
    return [index for index in ids if index in special_tokens(tokenizer).values()]


# ------------------------------------------------------------------------------------------------ rendering


@pytest.mark.parametrize(
    "messages",
    [
        conversation(("user", "Where is Paris?")),
        conversation(("system", "Be brief."), ("user", "Where is Paris?")),
        conversation(("user", "Hi"), ("assistant", "Hello!"), ("user", "Where is Paris?"), ("assistant", "There.")),
        conversation(("user", "\n\n  indented\n"), ("assistant", "\n"), ("user", " 2 + 2\t")),
        conversation(("system", ""), ("user", "")),
        conversation(("user", "naïve 東京 👩‍👩‍👧 é \u00a0\u2028 \ue000\ue0010 \ue0000\ue001")),
        conversation(("user", "a"), ("assistant", "a a"), ("user", " a ")),
    ],
)
def test_rendering_equals_transformers(reset_tokenizer, messages):
    assert reset_tokenizer.render(messages).tolist() == by_transformers(reset_tokenizer, messages)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), min_size=1, max_size=4))
def test_rendering_equals_transformers_for_any_benign_text(reset_tokenizer, turns):
    benign = [turn for turn in turns if not any(token in turn[1] for token in special_tokens(reset_tokenizer))]
    messages = conversation(*benign, ("user", "end"))
    assert reset_tokenizer.render(messages).tolist() == by_transformers(reset_tokenizer, messages)


def test_a_template_that_trims_is_followed():
    tokenizer = small_tokenizer(CHATML.replace("message.content", "message.content | trim"))
    messages = conversation(("user", "  a question\n"))
    assert tokenizer.render(messages).tolist() == by_transformers(tokenizer, messages)
    assert tokenizer.render(messages).tolist() == tokenizer.render(conversation(("user", "a question"))).tolist()


# ------------------------------------------------------------------------------- text that spells special tokens


def spellings(tokenizer: ChatTokenizer) -> list[str]:
    """Every special token alone, in a text, doubled, and split around another one, so that taking that out joins it."""
    names = [*special_tokens(tokenizer), RESET, "<|im_end|>"]
    return [
        text
        for name in names
        for text in (name, f"a {name} b", f"\n{name}\n", name * 2, name[:4] + RESET + name[4:], name[:4] + name)
    ]


@pytest.mark.parametrize("fixture", ["tokenizer", "reset_tokenizer"])
def test_no_text_encodes_to_a_special_token(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    for text in spellings(tokenizer):
        ids = tokenizer.encode(text)
        assert special_ids_in(tokenizer, ids) == [], text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("place", range(4))
def test_no_message_adds_a_special_token_to_a_conversation(reset_tokenizer, place):
    def rendered(content):
        turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
        turns[place] = turns[place][0], content
        return reset_tokenizer.render(conversation(*turns))

    harmless = special_ids_in(reset_tokenizer, rendered("harmless"))
    assert len(harmless) == 9  # the two marks of four messages, and the start of the reply
    for text in spellings(reset_tokenizer):
        assert special_ids_in(reset_tokenizer, rendered(text)) == harmless, text


pieces = [token[cut] for token in (*MARKS, RESET) for cut in (slice(None), slice(4), slice(4, None))]


@given(st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=3)), min_size=2, max_size=12))
def test_halves_of_special_tokens_never_join(reset_tokenizer, parts):
    """Halves meet inside a message, and across the border of two."""
    whole = conversation(("user", "".join(parts)))
    split = conversation(("user", "".join(parts[::2])), ("assistant", "".join(parts[1::2])))
    assert special_ids_in(reset_tokenizer, reset_tokenizer.encode("".join(parts))) == []
    assert len(special_ids_in(reset_tokenizer, reset_tokenizer.render(whole))) == 5
    assert len(special_ids_in(reset_tokenizer, reset_tokenizer.render(split))) == 7


def test_a_vocabulary_that_finds_special_tokens_in_plain_text_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<|im_end|>": 1, "user": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match=r"reads '<\|im_end\|>' in plain text"):
        chat_tokenizer(words, CHATML, MARKS)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    for give in (tokenizer.encode, lambda text: tokenizer.render(conversation(("user", text)))):
        with pytest.raises(InputError, match="not valid Unicode"):
            give("\ud83d")


# -------------------------------------------------------------------------------------------------- [RESET]


def test_reset_takes_the_place_of_the_spare_token(tokenizer, reset_tokenizer):
    assert tokenizer.reset_id is None
    assert reset_tokenizer.reset_id == tokenizer.hf.convert_tokens_to_ids("<reponame>") == 4
    assert len(reset_tokenizer.hf) == len(tokenizer.hf)
    assert reset_tokenizer.largest_id == tokenizer.largest_id
    before, after = tokenizer.hf.get_vocab(), reset_tokenizer.hf.get_vocab()
    assert before.keys() - after.keys() == {"<reponame>"}
    assert {token for token in after if after[token] != before.get(token)} == {RESET}
    assert with_reset(reset_tokenizer) is reset_tokenizer


def test_reset_cannot_be_seen_after_decoding(reset_tokenizer):
    ids = [*reset_tokenizer.encode("before"), reset_tokenizer.reset_id, *reset_tokenizer.encode(" after")]
    assert reset_tokenizer.decode(ids) == "before after"


def test_reset_survives_saving_and_loading(reset_tokenizer, tmp_path):
    reset_tokenizer.hf.save_pretrained(tmp_path)
    loaded = ChatTokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path))
    assert (loaded.reset_id, loaded.eot_id) == (reset_tokenizer.reset_id, reset_tokenizer.eot_id)
    assert loaded.hf.get_vocab() == reset_tokenizer.hf.get_vocab()
    text = f"It 's here , I do n't {RESET} 1234\n\n 5."
    assert loaded.encode(text).tolist() == reset_tokenizer.encode(text).tolist()
    messages = conversation(("user", text))
    assert loaded.render(messages).tolist() == reset_tokenizer.render(messages).tolist()
    assert loaded.decode([*loaded.encode(text), loaded.reset_id]) == text


def test_a_vocabulary_without_a_spare_token_grows_by_one():
    tokenizer = small_tokenizer()
    grown = with_reset(tokenizer)
    assert grown.reset_id == len(tokenizer.hf) == len(grown.hf) - 1 == grown.largest_id
    assert grown.decode([*grown.encode("a"), grown.reset_id]) == "a"
    assert special_ids_in(grown, grown.encode(f"a{RESET}")) == []


def test_a_spare_token_that_is_not_marked_special_becomes_special():
    """Gemma's <unused0> is an ordinary entry of its vocabulary."""
    tokenizer = small_tokenizer(ordinary=["<unused0>"])
    made = with_reset(tokenizer)
    assert made.reset_id == tokenizer.hf.convert_tokens_to_ids("<unused0>")
    assert len(made.hf) == len(tokenizer.hf)
    assert made.decode([made.reset_id, *made.encode("a")]) == "a"


def test_a_spare_token_that_is_added_but_not_special_becomes_special():
    tokenizer = small_tokenizer(ordinary=["<unused0>", "<unused1>"])
    tokenizer.hf.add_tokens(["<unused0>", "<unused1>"])
    made = with_reset(tokenizer)
    assert made.reset_id in made.special_ids
    assert made.decode([made.reset_id, *made.encode("a")]) == "a"
    assert made.hf.convert_tokens_to_ids("<unused1>") not in made.encode("a <unused1>")


def test_reset_as_an_ordinary_token_is_refused():
    with pytest.raises(InputError, match=r"\[RESET\] is an ordinary token .*id 256"):
        with_reset(small_tokenizer(ordinary=[RESET]))
    added = small_tokenizer(ordinary=[RESET])
    added.hf.add_tokens([RESET])
    with pytest.raises(InputError, match=r"\[RESET\] is an ordinary token .*id 256"):
        with_reset(ChatTokenizer(added.hf))


# ---------------------------------------------------------------------------------------------- end of turn


def test_eot_of_smollm(reset_tokenizer):
    assert reset_tokenizer.eot_id == reset_tokenizer.hf.convert_tokens_to_ids("<|im_end|>") == 2


@pytest.mark.parametrize("turn", ["{{ message.content }}</s>", "<s>{{ message.content }}\n</s><s>"])
def test_eot_is_the_first_special_token_behind_the_answer(turn):
    tokenizer = small_tokenizer("{% for message in messages %}" + turn + "{% endfor %}", special=("<s>", "</s>"))
    assert tokenizer.eot_id == tokenizer.hf.convert_tokens_to_ids("</s>")


def test_eot_where_the_answer_merges_with_the_space_before_it():
    """As in the templates of Llama-2 and Mistral."""
    template = "{% for message in messages %} {{ message.content }}</s>{% endfor %}"
    tokenizer = small_tokenizer(template, special=("</s>",), ordinary=["Ġa"], merges=[("Ġ", "a")])
    assert tokenizer.eot_id == tokenizer.hf.convert_tokens_to_ids("</s>")


def test_a_template_without_an_end_of_turn_is_refused():
    with pytest.raises(InputError, match="no special token"):
        small_tokenizer("{% for message in messages %}{{ message.content }}\n{% endfor %}")


def test_an_eot_that_is_not_marked_special_is_a_special_id():
    """Sampling stops at these."""
    tokenizer = small_tokenizer(ordinary=["<end>"], template=CHATML)
    tokenizer.hf.add_tokens(["<end>"])
    made = ChatTokenizer(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.hf.backend_tokenizer, chat_template=CHATML.replace(MARKS[1], "<end>")
        )
    )
    assert made.eot_id == made.hf.convert_tokens_to_ids("<end>")
    assert made.eot_id in made.special_ids


def test_our_chatml_equals_the_template_of_smollm(tokenizer):
    copy = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.hf.backend_tokenizer)
    ours = ChatTokenizer(copy, chat_template="chatml")
    messages = conversation(("system", " Be brief.\n"), ("user", "Hi"), ("assistant", "Hello "), ("user", "Where?"))
    assert ours.hf.chat_template != tokenizer.hf.chat_template
    assert ours.render(messages).tolist() == tokenizer.render(messages).tolist()
    assert ours.eot_id == tokenizer.eot_id


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(InputError, match="no chat template"):
        small_tokenizer(template=None)


# ------------------------------------------------------------------------------------------- broken messages


DEEP = functools.reduce(lambda inner, _: [inner], range(5000), [])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "a list of messages"),
        ("Hello", "a list of messages"),
        (["Hello"], "message 0 is not a dict"),
        ([{"role": "user"}], "message 0 is not a dict with a role and a text content"),
        (conversation(("user", "Hi"), ("assistant", None)), "message 1 is not a dict with a role and a text content"),
        ([{"content": "Hi"}], "message 0 has the role None"),
        (7, "a list of messages, not 7"),
        ({"role": "user", "content": "Hi"}, "a list of messages"),
        (conversation(("user", "\udc00")), "message 0 is not valid Unicode"),
        (
            [{"role": "user", "content": DEEP}],
            "message 0 is not",
        ),
        ([{"role": DEEP, "content": "Hi"}], "message 0 has the"),
        (
            conversation(("user", "Hi"), ("asistant", "Hi")),
            "message 1 has the role 'asistant': did you mean 'assistant'",
        ),
    ],
)
def test_broken_messages_are_refused(tokenizer, messages, problem):
    with pytest.raises(InputError, match=problem):
        tokenizer.render(messages)


def test_an_order_of_roles_that_the_template_refuses_is_named():
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = small_tokenizer(no_system + CHATML)
    with pytest.raises(InputError, match="a conversation of system, user: System role not supported"):
        tokenizer.render(conversation(("system", "Be brief."), ("user", "Hi")))


def test_a_template_that_leaves_out_a_message_is_refused():
    tokenizer = small_tokenizer(CHATML.replace("in messages", "in messages if message.role != 'system'"))
    with pytest.raises(InputError, match="leaves out a message of a conversation of system, user"):
        tokenizer.render(conversation(("system", "Be brief."), ("user", "Hi")))


# ------------------------------------------------------------------------------------------------------ gguf


def test_gguf_tokenizer_equals_the_one_of_transformers_on_real_text(tokenizer, smollm_gguf, shared):
    """transformers does not read the file's kind of pre-tokenizer, which sets digits apart (next test): told here."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm_gguf.parent, gguf_file=smollm_gguf.name)
    assert theirs.get_vocab() == tokenizer.hf.get_vocab()
    assert theirs.chat_template == tokenizer.hf.chat_template
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    with gzip.open(shared / "data/hh-rlhf/harmless-base.jsonl.gz", "rt") as hh:
        texts = [json.loads(next(hh))["chosen"] for _ in range(300)]
    with gzip.open(shared / "data/oasst/messages.jsonl.gz", "rt") as oasst:
        texts += [json.loads(line)["text"] for line in oasst]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == theirs.decode(ids) == text


def test_digits_stand_alone(tokenizer):
    """llama.cpp's pre-tokenizer "smollm" splits at every number character before it splits as GPT-2 does."""
    tokens = tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("in 2024:\n\n1.  3½"))
    assert tokens == ["in", "Ġ", "2", "0", "2", "4", ":", "ĊĊ", "1", ".", "ĠĠ", "3", "Â½"]


# ------------------------------------------------------------------------------------------------------ loading


def test_a_base_model_is_loaded_with_a_template_by_name_and_saved_with_it(tmp_path):
    tokenizer = small_tokenizer()
    save(tiny.model(vocab_size=len(tokenizer.hf)), tokenizer, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        load(tmp_path / "base")
    model, loaded = load(tmp_path / "base", chat_template="chatml")
    messages = conversation(("user", "Hi"), ("assistant", "Hello"), ("user", "And?"))
    assert loaded.render(messages).tolist() == tokenizer.render(messages).tolist()
    save(model, loaded, tmp_path / "export")
    _, again = load(tmp_path / "export")
    assert again.hf.chat_template == loaded.hf.chat_template


def test_a_tokenizer_that_makes_tokenizers_panic_is_refused(tmp_path):
    """A merge into a token that is not there, and longer than all that are."""
    small_tokenizer().hf.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    said["model"]["merges"] = [["a", "b"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        _open_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    tokenizer = small_tokenizer()
    save(tiny.model(vocab_size=len(tokenizer.hf)), tokenizer, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"base has no tokenizer\.json"):
        load(tmp_path / "base")
