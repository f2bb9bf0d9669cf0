"""Templates as people have them: training sees the tokens of transformers for the whole conversation, or none."""

import copy
import itertools

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data.examples import encode
from jax_backtrack.data.preferences import Preference, Report
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.replies import Writing
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.streams import _certain
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.tokenizer.untrusted import kind_for
from tests import tiny
from tests.chat_tokenizers import CHATML, MARKS, conversation, small_tokenizer

LEFT_OUT, SPLIT = "leaves out a message", "splits the end of the generation prompt otherwise"
CONTRADICTS = "contradicts itself"

# Prompts and replies by what a template may stumble over.
CONVERSATIONS = {
    "plain": (conversation(("user", "Where is Paris?")), "In France."),
    "system": (conversation(("system", "Be brief."), ("user", "Where is Paris?")), "In France."),
    "turns": (conversation(("user", "Hi"), ("assistant", "Hello!"), ("user", "Where is\n\nParis?")), "In France."),
    "Unicode": (conversation(("user", "naïve 東京 👩‍👩‍👧 \u00a0\u2028 \ue000\ue0010 \U000f0000")), "é東京👩‍👩‍👧"),
    "white space": (conversation(("user", "  Hi \n\n")), "  def f():\n\treturn 1\n"),
    "newlines": (conversation(("user", "Hi")), "\n\nHello\n\n"),
    "thoughts": (conversation(("user", "a </think> b")), "<think>hm</think>So."),
    "flag": (conversation(("user", "Hi /no_think")), "Hello"),
    "long": (conversation(("user", "word " * 500)), "so " * 900 + "on"),
    "quotes": (conversation(("user", 'say "x" \\ <b>')), 'a "b" \\n'),
}
# Templates whose generation prompt ends with a newline, which becomes one token with the white space of a reply.
JOINED = "joined"
JOINS = {"white space": JOINED, "newlines": JOINED}
NO_SYSTEM = {"system": LEFT_OUT}

# Of each template in the folder of cases: the reason why it is refused, or the reasons by conversation.
OUTCOMES = {
    "default_system": JOINS,
    "drops_system": JOINS | NO_SYSTEM,
    "eos_after_newline": {},
    "eot_if_not_last": "ends the assistant's turn with no special token",
    "gen_no_newline": {},
    "generation": JOINS,
    "len_tokens": dict.fromkeys(CONVERSATIONS, CONTRADICTS),
    "llama2": NO_SYSTEM,
    "llama32_date": JOINS,
    "mistral_sys_last": NO_SYSTEM,
    "no_eot": "ends the assistant's turn with no special token",
    "no_think_flag": JOINS | {"flag": CONTRADICTS},
    "parts_only": "wants contents as lists of parts",
    "parts_or_str": {},
    "repeats_question": dict.fromkeys(CONVERSATIONS, CONTRADICTS),
    "requires_system": "a system message is needed",
    "slice_content": JOINS,
    "syntax_error": "a syntax error in line 1",
    "think_prompt": dict.fromkeys(CONVERSATIONS, CONTRADICTS),
    "think_strip": dict.fromkeys(CONVERSATIONS, CONTRADICTS),
    "tojson": {},
    "upper_first": {"white space": JOINED},
    "user_role_field": JOINS,
    "vicuna": {},
    "zephyr": JOINS,
}


def with_template(tokenizer: ChatTokenizer, template: str) -> ChatTokenizer:
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template = template
    return ChatTokenizer(hf)


def whole_by_transformers(tokenizer: ChatTokenizer, prompt, reply: str) -> list[int]:
    """Ids of the whole conversation up to its last end of turn; nothing but white space may follow that."""
    said = [*prompt, {"role": "assistant", "content": reply}]
    ids = tokenizer.hf.apply_chat_template(said, tokenize=True, return_dict=True)["input_ids"]
    end = len(ids) - ids[::-1].index(tokenizer.eot_id)
    assert not tokenizer.hf.decode(ids[end:]).strip()
    return ids[:end]


def trained(tokenizer: ChatTokenizer, prompt, reply: str) -> tuple[list[int], list[int]]:
    """Prompt and reply, with its end of turn, that training sees."""
    (turn,) = tokenizer.render_turns(prompt, [reply])
    assert turn.prompt.tolist() == tokenizer.render(prompt).tolist()
    return turn.prompt.tolist(), turn.reply.tolist()


def assert_equal(tokenizer: ChatTokenizer, prompt, reply: str):
    """What is trained on is what transformers gives, and what sampling begins with is too."""
    begun, said = trained(tokenizer, prompt, reply)
    assert begun + said == whole_by_transformers(tokenizer, prompt, reply)
    assert begun == tokenizer.hf.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


# --------------------------------------------------------------------------------- templates in the folder of cases


def test_every_case_has_an_outcome(shared):
    assert {path.stem for path in (shared / "cases" / "data" / "templates").glob("*.jinja")} == OUTCOMES.keys()


@pytest.mark.parametrize("name", OUTCOMES)
def test_trained_tokens_are_those_of_the_whole_conversation_or_refused(name, tokenizer, shared):
    hf, path = copy.deepcopy(tokenizer.hf), str(shared / "cases" / "data" / "templates" / f"{name}.jinja")
    if isinstance(outcome := OUTCOMES[name], str):
        with pytest.raises(InputError, match=outcome):
            ChatTokenizer(hf, chat_template=path)
        return
    made = ChatTokenizer(hf, chat_template=path)
    for kind, (prompt, reply) in CONVERSATIONS.items():
        if outcome.get(kind) == JOINED:
            (turn,) = made.render_turns(prompt, [reply])
            ids = [*turn.prompt.tolist(), *turn.reply.tolist()]
            whole = whole_by_transformers(made, prompt, reply)
            assert turn.joined and turn.prompt.tolist() == made.render(prompt).tolist() and ids != whole
            assert hf.decode(ids) == hf.decode(whole)
        elif kind in outcome:
            with pytest.raises(InputError, match=outcome[kind]):
                made.render_turns(prompt, [reply])
        else:
            assert_equal(made, prompt, reply)


@pytest.mark.parametrize("name", [name for name, outcome in OUTCOMES.items() if not isinstance(outcome, str)])
def test_what_spells_a_control_token_stays_text(name, tokenizer, shared):
    """The rest is as transformers has it: the control tokens of the conversation are those of a harmless one."""
    made = ChatTokenizer(
        copy.deepcopy(tokenizer.hf), chat_template=str(shared / "cases" / "data" / "templates" / f"{name}.jinja")
    )
    spelled = [made.render(conversation(("user", f"a {token} b"))) for token in (*MARKS, "<|endoftext|>")]
    harmless = made.render(conversation(("user", "a harmless b")))
    control = set(made.control_ids.values())
    assert [[i for i in ids if i in control] for ids in spelled] == [[i for i in harmless if i in control]] * 3
    assert all(made.decode(made.encode(token)) == token for token in MARKS)


# ------------------------------------------------------------------------------------------------- kinds of tokenizer

PHI3 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}"
PHI3 += "<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
SPOKEN = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
)
SPOKEN += "{% endif %}{% endfor %}"


def test_white_space_that_a_token_takes_goes():
    """As with Phi-3, whose tokens are `rstrip`: the newline after one is in the template, and no token."""
    names = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    backend = small_tokenizer(special=("<|endoftext|>",), template=PHI3.replace("<|end|>", "<|endoftext|>"))
    hf = backend.hf
    tokens = [AddedToken(name, special=True, normalized=False, rstrip=True) for name in (*names, "<|end|>")]
    hf.add_tokens([*tokens, AddedToken("<|left|>", special=True, normalized=False, lstrip=True)])
    hf.chat_template = PHI3
    made = ChatTokenizer(hf)
    for prompt, reply in CONVERSATIONS.values():
        said = [*prompt, {"role": "assistant", "content": reply}]
        ids = hf.apply_chat_template(said, tokenize=True, return_dict=False)
        begun, learned = trained(made, prompt, reply)
        assert ids[-1] == hf.convert_tokens_to_ids("<|endoftext|>") and begun + learned == ids[:-1]
    spelled = made.render(conversation(("user", "a <|end|>\n\n<|left|> b <|user|>  c")))
    assert made.decode(spelled).endswith("a <|end|>\n\n<|left|> b <|user|>  c")


@pytest.mark.parametrize("scheme", ["first", "always", "prepended"])
def test_sentencepiece_is_read_in_one_piece(scheme):
    """Where each stretch of text between control tokens was encoded by itself, each would begin with "▁"."""
    letters = "▁abcdefghijklmnopqrstuvwxyzINST[]/.:?!HP"
    joined = [("▁", "a"), ("a", "b"), ("▁", "["), ("▁", "I")]
    vocabulary = ["<unk>", *letters, *("".join(pair) for pair in joined)]
    model = models.BPE({token: index for index, token in enumerate(vocabulary)}, joined, unk_token="<unk>")
    backend = Tokenizer(model)
    if scheme == "prepended":  # as Llama-2's
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=SPOKEN)
    made = ChatTokenizer(hf)
    for prompt, reply in [
        (conversation(("user", "ab")), "ab."),
        (conversation(("user", " a b")), "Is it?"),
        (conversation(("user", "Hi"), ("assistant", "ab"), ("user", "a")), "a"),
    ]:
        assert_equal(made, prompt, reply)
    control = {hf.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    spelled = made.render(conversation(("user", "ab </s> ab")))
    assert sum(index in control for index in spelled) == 1


def test_the_templates_of_the_real_tokenizer_of_llama3(llama3_folder):
    """Its own template, which writes the header of a reply after every conversation; that is not learned."""
    made = ChatTokenizer(transformers.PreTrainedTokenizerFast.from_pretrained(llama3_folder))
    for prompt, reply in CONVERSATIONS.values():
        ids = made.hf.apply_chat_template(
            [*prompt, {"role": "assistant", "content": reply}], tokenize=True, return_dict=False
        )
        begun, learned = trained(made, prompt, reply)
        assert begun + learned == ids[: len(begun + learned)]
        assert made.decode(ids[len(begun + learned) :]) == "assistant\n\n"


# ---------------------------------------------------------------------------------------------- around a reply

GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant"
IF_REPLY = "{% if m.role == 'assistant' %}"
# Template, and what it writes before and after a reply.
FRAMES = {
    "a space": (
        "{% for m in messages %}<|im_start|>{{ m.role }}:" + IF_REPLY + " {% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}" + GENERATION + ":{% endif %}",
        " ",
        "",
    ),
    "a newline": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        + GENERATION
        + "{% endif %}",
        "\n",
        "",
    ),
    "a space and a newline": (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n<|im_end|>{% endfor %}"
        + GENERATION
        + ":{% endif %}",
        " ",
        "\n",
    ),
    "thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + IF_REPLY + "<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + GENERATION + "\n{% endif %}",
        "<think>\n\n</think>\n\n",
        "",
    ),
}


@pytest.fixture(params=FRAMES)
def framed(request, reset_tokenizer):
    template, opening, closing = FRAMES[request.param]
    made = with_template(reset_tokenizer, template)
    assert (made.opening, made.closing) == (opening, closing)
    return made


REPLIES = ["I can't.", "So:\n\n* a\n* b", "é東京 👩‍👩‍👧", "x"]


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_comes_back_without_what_the_template_writes_around_it(framed, reply):
    """And goes into the next turn as the ids that it was written with."""
    prompt = conversation(("user", "Hi"))
    begun, said = trained(framed, prompt, reply)
    draft = framed.begin_reply("Sure")
    writing = Writing(framed, stop_ids=[framed.eot_id])
    writing.take(draft, is_last=False)
    writing.take(np.asarray([framed.reset_id]), is_last=False)
    shown = []
    for place, token in enumerate(said):
        writing.take(np.asarray([token]), is_last=place == len(said) - 1)
        shown.append(writing.text() if writing.finish_reason else _certain(writing, 0))
    made = writing.reply()
    assert (made.text, made.drafts, made.finish_reason) == (reply, ("Sure",), "stop")
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    following = [*prompt, {"role": "assistant", "content": made.text}, {"role": "user", "content": "And?"}]
    assert framed.render(following).tolist()[: len(begun + said)] == begun + said


def test_a_prefix_is_written_where_a_reply_is(framed):
    prompt = conversation(("user", "Hi"))
    begun, said = trained(framed, prompt, "I can't say that.")
    assert framed.begin_reply("I can't").tolist() == said[: len(framed.begin_reply("I can't"))]
    assert framed.encode_parts(framed.render_parts(prompt, "I can't say that.")).tolist() == [
        *begun,
        *framed.begin_reply("I can't say that."),
    ]
    assert framed.begin_reply("").tolist() == []


def test_no_draft_is_the_templates_text_alone(framed):
    """A rejected reply that the chosen one begins with differs from it in what the template writes after it only."""
    recipe = TreeSpec("sft", True, "rewind", framed.reset_id)

    def preference(chosen, rejected, whole=True):
        return Preference(tuple(conversation(("user", "Hi"))), chosen, rejected, rejected is not None, "row", whole)

    report = Report()
    pairs = [preference("No idea. Sorry.", "No idea."), preference("No idea.", "So it is.")]
    (example,) = encode(pairs, framed, recipe, 256, report)
    assert report.dropped == {"the rejected reply is a prefix of the chosen one": 1}
    begun, said = trained(framed, pairs[1].prompt, "No idea.")
    assert [*example.prompt, *example.chosen] == begun + said
    shared = len(framed.begin_reply(" ")) - 1
    assert (example.chosen[:shared] == example.rejected[:shared]).all()
    (cut,) = encode([preference("Paris is in the", None, whole=False)], framed, recipe, 256, Report())
    assert framed.decode_reply(cut.chosen) == "Paris is in the"


def test_a_template_without_a_generation_prompt_is_refused(tokenizer):
    """The reply would begin with a token at which sampling ends."""
    template = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
    made = with_template(tokenizer, template)
    for refused in (
        lambda: made.render_turns(conversation(("user", "Hi")), ["Hello"]),
        lambda: Sampler(tiny.model(vocab_size=tiny.SHORT), made),
    ):
        with pytest.raises(InputError, match=r"writes '<\|im_start\|>' after its generation prompt"):
            refused()


def test_a_reply_is_cut_behind_what_the_template_writes_before_it(framed):
    recipe = TreeSpec("sft", False, "keep", None)
    row = Preference(tuple(conversation(("user", "Hi"))), "Paris is in the north.", None, False, "row")
    (cut,) = encode([row], framed, recipe, 256, Report(), max_response_length=3)
    _, whole = trained(framed, row.prompt, row.chosen)
    kept = cut.chosen.tolist()
    assert kept == whole[: len(kept)]
    texts = [framed.decode_reply(kept[: len(kept) - left]) for left in range(4)]
    assert [*texts[:3]] == sorted({*texts[:3]}, key=len, reverse=True) and not texts[3].strip()


def test_replies_that_a_template_changes_are_counted(tokenizer):
    made = with_template(tokenizer, CHATML.replace("message.content", "message.content[:20]"))
    recipe = TreeSpec("sft", False, "keep", None)
    rows = [
        Preference(tuple(conversation(("user", "Hi"))), "so " * count, None, False, f"row {count}")
        for count in (2, 9, 8)
    ]
    report = Report()
    encode(rows, made, recipe, 256, report)
    assert report.altered == {"rows with a reply that the chat template changes": 2}
    assert report.first["rows with a reply that the chat template changes"] == "row 9"


def test_a_reply_of_which_nothing_is_left_is_refused(tokenizer):
    made = with_template(tokenizer, CHATML.replace("message.content", "message.content.split('</t>')[-1]"))
    with pytest.raises(InputError, match="leaves nothing of a reply"):
        made.render_turns(conversation(("user", "Hi")), ["thoughts</t>\n"])


def test_text_after_the_end_of_turn_is_refused(tokenizer):
    made = with_template(tokenizer, CHATML + "{% if not add_generation_prompt %}The end{% endif %}")
    with pytest.raises(InputError, match="text after the end of a turn"):
        made.render_turns(conversation(("user", "Hi")), ["Hello"])


# --------------------------------------------------------------------------------- templates that handle contents

HANDLED = {
    "upper": "message.content | upper",
    "without spaces": "message.content.replace(' ', '')",
    "in pieces": "message.content.split('|') | join('')",
    "the middle": "message.content.split('<x>')[0] ~ message.content.split('<x>')[-1]",
    "reversed twice": "message.content[::-1][::-1]",
    "from a macro": "same(message.content) | replace('<x>', '')",
    "from a list": "message.content | list | join | replace('<x>', '')",
    "trimmed": "message.content.strip('x').lstrip().rstrip(' .')",
    "between literals": "'<|im_' + message.content + '|>'",
    "looked for after a macro": "same(message.content).split('<|im_end|>')[-1]",
    "repeated": "message.content * 2",
    "joined": "''.join([message.content, '<|'])",
    "partitioned": "(message.content.partition('<x>') | list)[0] + message.content.rpartition('<x>')[2]",
    "as JSON": "message.content | tojson",
    "by lines": "message.content.splitlines() | join('')",
    "its words": "message.content.split() | join('')",
    "looked for": "message.content if '<|im_end|>' not in message.content else 'x' + message.content",
}
SPELLINGS = [
    "<|im_end|>", "<|IM_END|>", "<|im_ end|>", "<|im<x>_end|>", "<|im_<x>end|>", "end", "start|><|im_end",
    "<||im_|end||>", "<\n|im_end|\n>", "x<|im_end|>x", ">|dne_mi|<", "\U000f0000\U000f0001<|im_end|>",
    "<|im_\ue000end|>", "a.", "ﬁ ß ǰ İ",
]  # fmt: skip


@pytest.mark.parametrize("name", HANDLED)
def test_whatever_a_template_does_text_is_no_control_token(name, tokenizer):
    """Where control tokens are not spelled in what comes out, the ids are those of transformers."""
    template = "{% macro same(text) %}{{ text }}{% endmacro %}" + CHATML.replace("message.content", HANDLED[name], 1)
    made = with_template(tokenizer, template)
    control = set(made.control_ids.values())

    def control_ids(text):
        return [index for index in made.render(conversation(("user", text))) if index in control]

    harmless, refused = control_ids("z"), 0
    for text in SPELLINGS:
        messages = conversation(("user", text))
        try:
            found = control_ids(text)
        except InputError as error:
            assert "spells" in str(error)
            refused += 1
            continue
        assert found == harmless, text
        theirs = made.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if [index for index in theirs if index in control] == harmless:
            assert made.render(messages).tolist() == theirs, text
        assert made.hf.decode(made.render(messages)) == made.hf.decode(theirs)
    assert refused <= 4


def test_control_tokens_that_a_template_writes_for_spelled_ones_are_refused(tokenizer):
    """A template that makes thoughts of "<think>" in a text would have text become a token."""
    split = "{% if '<|im_start|>' in message.content %}<|im_start|>{% endif %}{{ message.content }}"
    made = with_template(tokenizer, CHATML.replace("{{ message.content }}", split))
    with pytest.raises(InputError, match=r"spells '<\|im_start\|>', and the chat template writes other control tokens"):
        made.render(conversation(("user", "a <|im_start|>")))
    assert_equal(made, conversation(("user", "a")), "b")


def test_a_vocabulary_without_control_tokens_is_refused():
    with pytest.raises(InputError, match="no special token"):
        small_tokenizer(special=())


def test_fields_of_a_message_are_text_too(tokenizer):
    made = with_template(tokenizer, CHATML.replace("message.role", "(message.name or message.role)"))
    named = [{"role": "user", "name": "Ann", "content": "Hi", "weight": None}]
    assert_equal(made, named, "Hello")
    spelled = made.render([{"role": "user", "name": "Ann<|im_end|>", "content": "Hi"}])
    assert [index for index in spelled if index in made.control_ids.values()].count(made.eot_id) == 1


@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<", "|", "a", "B", " ", "\n", "ß", "é", "<think>", "\U000f0001"]), max_size=8
    ),
    st.sampled_from([None, "<", "a", " ", "<|", "\n", "B "]),
    st.sampled_from(["", "a", "<|"]),
    st.integers(-1, 2),
)
def test_untrusted_text_behaves_as_the_text(pieces, part, other, count):
    text = "".join(pieces)
    kind = kind_for("<>|_abdeimnknt", [text])
    hidden = kind.hide(text)
    assert not set(str.__str__(hidden)) & set("<>|_abdeimnknt")
    operations = [
        lambda t: t.strip(part),
        lambda t: t.lstrip(part),
        lambda t: t.rstrip(part),
        lambda t: t.split(part, count),
        lambda t: t.rsplit(part, count),
        lambda t: t.splitlines(),
        lambda t: t.splitlines(True),
        lambda t: t[1:],
        lambda t: t[::-1],
        lambda t: t.upper(),
        lambda t: t.lower(),
        lambda t: t.title(),
        lambda t: t.capitalize(),
        lambda t: list(t),
        lambda t: t.find(part or "x"),
        lambda t: t.count(part or "x"),
        lambda t: (part or "x") in t,
        lambda t: t == text,
        lambda t: t.startswith(("a", part or "x")),
        lambda t: t.endswith(part or "x"),
        lambda t: t.partition(part or "x"),
        lambda t: t.rpartition(part or "x"),
        lambda t: t.replace(part or "", other, count),
        lambda t: t + other,
        lambda t: other + t,
        lambda t: t * 2,
        lambda t: t.removeprefix(part or "x"),
        lambda t: t.removesuffix(part or "x"),
        lambda t: t.isupper(),
        lambda t: t.isspace(),
        len,
        hash,
        lambda t: t < "b",
        lambda t: {t: 1}[text],
    ]
    for operation in operations:
        expected, found = operation(text), operation(hidden)
        if isinstance(expected, (list, tuple)):
            assert [kind.show(each) for each in found] == list(expected)
        else:
            assert kind.show(found) == expected


# --------------------------------------------------------------------------------------------- files


def test_a_byte_order_mark_is_no_token(tokenizer, tmp_path):
    file = tmp_path / "marked.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    made = ChatTokenizer(copy.deepcopy(tokenizer.hf), chat_template=str(file))
    assert made.hf.chat_template == CHATML
    inside = with_template(tokenizer, "\ufeff" + CHATML)
    for each in (made, inside):
        assert_equal(each, *CONVERSATIONS["plain"])
        assert each.render(CONVERSATIONS["plain"][0])[0] == each.hf.convert_tokens_to_ids("<|im_start|>")


# -------------------------------------------------------------------------------------------------- any text

PIECES = [
    "<",
    "|",
    "im_",
    "end",
    "<|",
    "|>",
    " ",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "'",
    '"',
    "\\",
    "ß",
    "é",
    "/no_think",
    "</think>",
    "I",
]


@pytest.fixture(scope="module")
def several(tokenizer, shared):
    folder = shared / "cases" / "data" / "templates"
    names = (
        "vicuna",
        "llama2",
        "tojson",
        "upper_first",
        "parts_or_str",
        "no_think_flag",
        "eos_after_newline",
        "zephyr",
    )
    return [ChatTokenizer(copy.deepcopy(tokenizer.hf), chat_template=str(folder / f"{name}.jinja")) for name in names]


texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=8).map("".join)


@settings(max_examples=40)
@given(first=texts, answer=texts, second=texts, reply=texts)
def test_any_conversation_equals_that_of_transformers_or_is_refused(several, first, answer, second, reply):
    prompt = conversation(("user", first), ("assistant", answer), ("user", second))
    for made in several:
        if any(token in text for token in made.control_ids for text in (first, answer, second, reply)):
            continue
        assert made.render(prompt).tolist() == made.hf.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        try:
            (turn,) = made.render_turns(prompt, [reply])
        except InputError as error:
            assert any(reason in str(error) for reason in (SPLIT, CONTRADICTS, "leaves nothing"))
        else:
            whole = whole_by_transformers(made, prompt, reply)
            ids = [*turn.prompt, *turn.reply]
            assert ids == whole or (turn.joined and made.hf.decode(ids) == made.hf.decode(whole))
