"""The tokenizers of Llama-3 and Gemma-2: read as they are, rendered as transformers does, and safe from any text."""

import gzip
import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import _open_tokenizer
from jax_backtrack.tokenizer.chat_tokenizer import RESET, ChatTokenizer, with_reset
from tests.chat_tokenizers import EARLY, GEMMA2_TEXT, by_transformers, conversation

# Name: ids of the spare token, the end of turn and the start of text; entries of the vocabulary.
FACTS = {"llama3": (128002, 128009, 128000, 128256), "gemma2": (7, 107, 2, 256000)}

SPACES = ["a" + " " * count + "b" for count in range(1, 40)] + ["a" + "\t" * count + "b" for count in range(1, 40)]
TEXTS = [
    "<table>\n<tr><td>1</td><th>two </th></tr>\n</table>\n\n\n<h1>A</h1><s>old</s> <p>not one token</p>",
    "def f(x):\n    if x:\n\t\treturn  x   # <b>\n\n\n\n    return None\n",
    "\n" * 40 + "a" + "\n \n  \n\t\n",
    " leading and trailing  ",
    "naïve 東京 👩‍👩‍👧 é \u00a0\u2028 \ue000\ue0010 \x00 \U0010ffff",
    "It 's here , I do n't know . 1234567 ! ? (a) [b] {c} <0x0A> < |eot_id| >",
    "",
    *SPACES,
]

CONVERSATION = conversation(("user", "  Hi \n"), ("assistant", "Hello ."), ("user", "<b>Where</b> is\n\n\nParis?"))


@pytest.fixture(scope="module", params=FACTS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, request):
    return request.getfixturevalue(f"{name}_folder")


@pytest.fixture(scope="module")
def plain(name, folder) -> ChatTokenizer:
    """As it comes, with our template."""
    return ChatTokenizer(_open_tokenizer(folder), chat_template=name)


@pytest.fixture(scope="module")
def tokenizer(plain) -> ChatTokenizer:
    """With [RESET]."""
    return with_reset(plain)


@pytest.fixture(scope="module")
def control(name, tokenizer) -> dict[str, int]:
    """All added tokens that no text may give."""
    added = {token.content: index for index, token in tokenizer.hf.added_tokens_decoder.items()}
    return {token: index for token, index in added.items() if name == "llama3" or index not in GEMMA2_TEXT}


@pytest.fixture(scope="module")
def llama3(llama3_folder) -> ChatTokenizer:
    """With the template of its own."""
    return ChatTokenizer(_open_tokenizer(llama3_folder))


gemma2_only = pytest.mark.parametrize("name", ["gemma2"], indirect=True)


def controls_in(ids, control) -> list[int]:
    known = set(control.values())
    return [int(index) for index in ids if index in known]


# -------------------------------------------------------------------------------------------- reading and [RESET]


def test_what_is_read_is_what_the_files_say(name, folder, plain):
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.hf.backend_tokenizer.to_str() == theirs.to_str()
    says = json.loads((folder / "tokenizer_config.json").read_text())
    for token in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(plain.hf, token) == says.get(token)
    assert _open_tokenizer(folder).chat_template == says.get("chat_template")


def test_reset_takes_the_place_of_the_spare_token(name, plain, tokenizer):
    reset_id, eot_id, _, size = FACTS[name]
    assert (plain.reset_id, plain.eot_id) == (None, eot_id)
    assert (tokenizer.reset_id, tokenizer.eot_id) == (reset_id, eot_id)
    assert len(tokenizer.hf) == len(plain.hf) == tokenizer.largest_id + 1 == size
    before, after = plain.hf.get_vocab(), tokenizer.hf.get_vocab()
    assert before.keys() - after.keys() == {plain.hf.convert_ids_to_tokens(reset_id)}
    assert after == {token: index for token, index in before.items() if index != reset_id} | {RESET: reset_id}
    assert tokenizer.special_ids == plain.special_ids | {reset_id}
    assert tokenizer.decode([*tokenizer.encode("before"), reset_id, *tokenizer.encode(" after")]) == "before after"


def test_what_is_saved_is_read_alike_by_us_and_by_transformers(name, tokenizer, tmp_path):
    tokenizer.hf.save_pretrained(tmp_path)
    # AutoTokenizer chooses a class by the model's type, and one that rebuilt the tokenizer would make "<mask>" special.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": {"llama3": "llama"}.get(name, name)}))
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(hf) is transformers.PreTrainedTokenizerFast  # that is what we open it with
    assert hf.backend_tokenizer.to_str() == tokenizer.hf.backend_tokenizer.to_str()
    for token in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template"):
        assert getattr(hf, token) == getattr(tokenizer.hf, token)
    loaded = ChatTokenizer(hf)
    assert (loaded.reset_id, loaded.eot_id) == FACTS[name][:2]
    assert loaded.render(CONVERSATION).tolist() == by_transformers(loaded, CONVERSATION)
    assert hf.decode([*loaded.encode("a"), loaded.reset_id], skip_special_tokens=True) == "a"


# -------------------------------------------------------------------------------------------------------- texts


def test_texts_are_encoded_as_transformers_does(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.tolist() == tokenizer.hf.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == text


def test_real_texts_are_encoded_as_transformers_does(tokenizer, shared):
    with gzip.open(shared / "data/hh-rlhf/harmless-base.jsonl.gz", "rt") as hh:
        texts = [json.loads(next(hh))["chosen"] for _ in range(300)]
    with gzip.open(shared / "data/oasst/messages.jsonl.gz", "rt") as oasst:
        texts += [json.loads(line)["text"] for line in oasst][:1000]
    theirs = tokenizer.hf(texts, add_special_tokens=False).input_ids
    for text, ids in zip(texts, theirs, strict=True):
        assert tokenizer.encode(text).tolist() == ids, text
        assert tokenizer.decode(ids) == text


@gemma2_only
def test_html_and_white_space_are_one_token_each_in_gemma2(plain):
    for text in ("<table>", "</code>", "\n\n\n", " " * 31, "\t" * 31):
        assert len(plain.encode(text)) == 1, text


@gemma2_only
def test_the_mark_for_a_space_is_a_space_in_gemma2(plain):
    """SentencePiece spells a space so; a text with the mark itself comes back with spaces, in transformers too."""
    assert plain.encode("a▁b").tolist() == plain.encode("a b").tolist()
    for text in ("a▁b", "▁", "a▁▁▁b", "▁<start_of_▁turn>"):
        ids = plain.encode(text)
        assert ids.tolist() == plain.hf.encode(text, add_special_tokens=False)
        assert plain.decode(ids) == text.replace("▁", " ")


# ------------------------------------------------------------------------------------- text that spells control tokens


def spellings(control) -> list[str]:
    names = [*control, RESET, "<|im_end|>"]
    return [
        text for name in names for text in (name, f"a {name} b", name * 2, name[:4] + RESET + name[4:], name[:4] + name)
    ]


def test_the_control_tokens_are_those_that_are_meant(name, control):
    if name == "gemma2":
        spare = {f"<unused{number}>" for number in range(1, 100)}
        marks = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "[toxicity=0]", RESET}
        assert control.keys() == spare | marks | {"<start_of_turn>", "<end_of_turn>"}
    else:
        assert len(control) == 256


def test_no_text_encodes_to_a_control_token(tokenizer, control):
    for text in spellings(control):
        ids = tokenizer.encode(text)
        assert controls_in(ids, control) == [], text
        assert tokenizer.decode(ids) == text


def test_no_merge_of_the_vocabulary_makes_a_control_token(folder, control):
    """So that it does not depend on what stands around it."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert not {merge.replace(" ", "", 1) for merge in model["merges"]} & (control.keys() | {"<unused0>"})


@pytest.mark.parametrize("place", range(3))
def test_no_message_adds_a_control_token_to_a_conversation(tokenizer, control, place):
    def rendered(content):
        turns = [("user", "b"), ("assistant", "c"), ("user", "d")]
        turns[place] = turns[place][0], content
        return controls_in(tokenizer.render(conversation(*turns)), control)

    texts = spellings(control)
    harmless = rendered("harmless")
    for text in (*texts[:300], "\n".join(texts), "".join(texts)):
        assert rendered(text) == harmless, text


def test_no_system_prompt_adds_a_control_token(llama3):
    def rendered(content):
        ids = llama3.render(conversation(("system", content), ("user", "b")))
        return [index for index in ids if index >= 128000]

    texts = spellings(llama3.hf.get_added_vocab())
    assert rendered("\n".join(texts)) == rendered("harmless")


PIECES = [
    token[cut]
    for token in (
        "<|eot_id|>",
        "<|start_header_id|>",
        "<end_of_turn>",
        "<bos>",
        "<unused5>",
        "[@BOS@]",
        "<mask>",
        RESET,
    )
    for cut in (slice(None), slice(4), slice(4, None))
] + ["<b>", "\n\n", "  "]


@settings(max_examples=60)
@given(parts=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), min_size=2, max_size=12))
def test_halves_of_control_tokens_never_join(tokenizer, control, parts):
    """Halves meet inside a message, and across the border of two."""

    def rendered(*texts):
        roles = ("user", "assistant", "user")
        return controls_in(tokenizer.render(conversation(*zip(roles, texts, strict=False))), control)

    whole, odd, even = "".join(parts), "".join(parts[::2]), "".join(parts[1::2])
    assert controls_in(tokenizer.encode(whole), control) == []
    assert rendered(whole) == rendered("a")
    assert rendered(odd, even) == rendered("a", "b")


# ---------------------------------------------------------------------------------------------------- templates

RENDERED = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello .<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<b>Where</b> is\n\n\nParis?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello .<end_of_turn>\n"
    "<start_of_turn>user\n<b>Where</b> is\n\n\nParis?<end_of_turn>\n<start_of_turn>model\n",
}


def test_our_template_writes_the_format_of_the_model(name, tokenizer):
    ids = tokenizer.render(CONVERSATION).tolist()
    assert tokenizer.hf.backend_tokenizer.decode(ids, skip_special_tokens=False) == RENDERED[name]
    assert ids.count(FACTS[name][2]) == 1 and ids[0] == FACTS[name][2]
    assert ids.count(tokenizer.eot_id) == 3
    without = tokenizer.hf.apply_chat_template(CONVERSATION, tokenize=False)
    prompt = RENDERED[name][len(without) :]
    assert without + prompt == RENDERED[name] and prompt in (
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<start_of_turn>model\n",
    )


texts = st.lists(st.one_of(st.sampled_from([*TEXTS, "<td>", "\n\n", "   "]), st.text(max_size=5)), max_size=4)


@settings(max_examples=60)
@given(contents=st.lists(texts.map("".join), min_size=1, max_size=5))
def test_rendering_equals_transformers_for_any_benign_text(tokenizer, control, contents):
    benign = ["" if any(token in text for token in control) else text for text in contents]
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(benign)]
    assert tokenizer.render(messages).tolist() == by_transformers(tokenizer, messages)


@pytest.mark.parametrize(
    "messages",
    [
        conversation(("user", "Where is Paris?")),
        conversation(("system", " Be brief.\n"), ("user", "Where is Paris?")),
        CONVERSATION,
    ],
)
def test_our_template_equals_the_one_of_llama3(llama3, llama3_folder, messages):
    ours = ChatTokenizer(_open_tokenizer(llama3_folder), chat_template="llama3")
    ids = llama3.render(messages).tolist()
    assert ids == ours.render(messages).tolist() == by_transformers(llama3, messages)
    assert ids.count(llama3.hf.bos_token_id) == 1
    assert ids.count(llama3.eot_id) == len(messages)
    assert llama3.hf.backend_tokenizer.decode(ids[-4:], skip_special_tokens=False) == RENDERED["llama3"][-47:]


def test_a_template_that_writes_the_date(llama3_folder, tmp_path, in_zone):
    """As that of Llama-3.1."""
    today = in_zone(EARLY)
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{- bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}<|eot_id|>"
        "{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{%- endfor %}"
        "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{%- endif %}"
    )
    tokenizer = ChatTokenizer(_open_tokenizer(llama3_folder), chat_template=str(template))
    messages = conversation(("user", "Hi <|eot_id|>"), ("assistant", "Hello"), ("user", "Day?"))
    ids = tokenizer.render(messages).tolist()
    assert f"Today: {today:%d %b %Y}" in tokenizer.decode(ids)
    assert ids.count(tokenizer.eot_id) == 4
    messages[0]["content"] = "Hi"
    assert tokenizer.render(messages).tolist() == by_transformers(tokenizer, messages)


def test_a_reply_is_decoded_to_its_very_text(llama3):
    """Llama-3's configuration asks for a clean-up of spaces."""
    assert llama3.hf.clean_up_tokenization_spaces
    text = "It 's here , I do n't know ."
    assert llama3.decode([*llama3.encode(text), llama3.eot_id]) == text


def test_without_a_template_the_remedy_is_named(plain, monkeypatch):
    monkeypatch.setattr(plain.hf, "chat_template", None)
    with pytest.raises(InputError, match=r"model\.chat_template\) to chatml, gemma2, llama3 or .* \.jinja"):
        ChatTokenizer(plain.hf)


@pytest.mark.parametrize(
    ("chat_template", "problem"),
    [
        ("chatml", r"'chatml' writes <\|im_start\|>, which is no token of this tokenizer"),
        ("lama3", "did you mean 'llama3'"),
        ("nowhere/chat.jinja", r"nowhere/chat\.jinja cannot be read"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(plain, chat_template, problem):
    own = plain.hf.chat_template
    with pytest.raises(InputError, match=problem):
        ChatTokenizer(plain.hf, chat_template=chat_template)
    assert plain.hf.chat_template == own


def test_a_template_of_another_family_is_refused(name, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(plain.hf, "chat_template", plain.hf.chat_template)  # so that it is put back
    with pytest.raises(InputError, match="no token of this tokenizer"):
        ChatTokenizer(plain.hf, chat_template={"llama3": "gemma2", "gemma2": "llama3"}[name])
    file = tmp_path / "own.jinja"
    file.write_text("{% for message in messages %}{{ message.content }}<|im_end|>\n{% endfor %}")
    with pytest.raises(InputError, match=r"no special token of this tokenizer: .* stands '<\|im_end\|>\\n'"):
        ChatTokenizer(plain.hf, chat_template=str(file))


@gemma2_only
@pytest.mark.parametrize("turns", [("system", "user"), ("user", "user"), ("assistant", "user")])
def test_gemma2_takes_no_system_role_and_two_who_take_turns(plain, turns):
    with pytest.raises(InputError, match=r"refuses a conversation of .*(no system role|must take turns)"):
        plain.render(conversation(*((role, "Hi") for role in turns)))
