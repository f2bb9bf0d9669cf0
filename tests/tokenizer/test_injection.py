"""No text becomes a special token, wherever it goes in: every special token of three real tokenizers, spelt as it is
and as what looks like it, in all places where prompts, data, drafts and attacks are read.

The measure is the same conversation with a benign text: the special ids are those that the template wrote, no others.
"""

import collections
import csv
import dataclasses
import functools
import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data import prompt_sets, sources
from jax_backtrack.data.examples import encode
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.attacks.gcg import Objective
from jax_backtrack.hub.load import _open_tokenizer
from jax_backtrack.sampling.files import read_prompts
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.settings import SamplingParams
from jax_backtrack.tokenizer.chat_tokenizer import RESET, ChatTokenizer, with_reset
from tests import tiny
from tests.chat_tokenizers import GEMMA2_TEXT, conversation

BENIGN = "a question"
SPARE = {"SmolLM2": "<reponame>", "Llama-3": "<|reserved_special_token_0|>", "Gemma-2": "<unused0>"}
# Of each tokenizer those that templates write, or that mean most; the others are tried too, many in one text.
FIRST = {
    "SmolLM2": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "Llama-3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    "Gemma-2": ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<mask>", "[@BOS@]", "<unused5>"),
}

FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
BRACKETS = {ord(sign): ord(sign) + 0xFEE0 for sign in "<|>[]"}
BOLD = {ord("a") + place: 0x1D41A + place for place in range(26)}  # mathematical letters, which NFKC makes plain ones
CYRILLIC = str.maketrans("aeopcxyE", "аеорсхуЕ")
ANGLES = str.maketrans("<>|[]", "‹›│⟦⟧")


def between(sign: str) -> Callable[[str], str]:
    return lambda token: token[: len(token) // 2] + sign + token[len(token) // 2 :]


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda token: token,
    "in a text": lambda token: f"so {token} it is",
    "on a line": lambda token: f"so\n{token}\nit is",
    "twice": lambda token: token * 2,
    "in its own middle": lambda token: between(token)(token),
    "around [RESET]": between(RESET),
    "full width": lambda token: token.translate(FULL_WIDTH),
    "full-width brackets": lambda token: token.translate(BRACKETS),
    "mathematical letters": lambda token: token.translate(BOLD),
    "Cyrillic letters": lambda token: token.translate(CYRILLIC),
    "other brackets": lambda token: token.translate(ANGLES),
    "upper case": str.upper,
    "zero-width joiner inside": between("\u200d"),
    "zero-width space inside": between("\u200b"),
    "soft hyphen inside": between("\u00ad"),
    "byte order mark inside": between("\ufeff"),
    "zero-width joiners throughout": "\u200d".join,
    "combining mark inside": between("\u0301"),
    "combining mark behind": lambda token: token + "\u0338",
    "combining mark before": lambda token: "a\u0301" + token,
    "SentencePiece's space": lambda token: "▁" + token.replace("_", "▁") + "▁",
    "spaces": lambda token: token.replace("_", " ").replace("|", " | "),
    "byte-level BPE's space": lambda token: "Ġ" + token + "Ċ",
    "bytes by name": lambda token: "".join(f"<0x{byte:02X}>" for byte in token.encode()),
    "escapes of HTML": lambda token: token.replace("<", "&lt;").replace(">", "&gt;"),
    "escapes of JSON": lambda token: "".join(f"\\u{ord(sign):04x}" for sign in token),
    "after the renderer's stand-ins": lambda token: "".join(map(chr, range(0xF0000, 0xF0000 + len(token)))) + token,
}


def test_full_width_and_mathematical_letters_are_the_token_to_nfkc():
    for name in ("full width", "full-width brackets", "mathematical letters"):
        assert unicodedata.normalize("NFKC", SPELLINGS[name]("<|eot_id|>")) == "<|eot_id|>"


# --------------------------------------------------------------------------------------------------- tokenizers


@dataclasses.dataclass(frozen=True)
class Named:
    """A tokenizer with [RESET], and the ids that no text may give."""

    name: str
    tokenizer: ChatTokenizer
    sampler: Sampler

    @functools.cached_property
    def tokens(self) -> dict[str, int]:
        """Special tokens, and whatever else was added to the vocabulary and is no plain text."""
        added = {token.content: index for index, token in self.tokenizer.hf.added_tokens_decoder.items()}
        return {token: at for token, at in added.items() if self.name != "Gemma-2" or at not in GEMMA2_TEXT}

    def special(self, ids: Sequence[int]) -> list[int]:
        return [int(index) for index in ids if int(index) in self._known]

    @functools.cached_property
    def _known(self) -> set[int]:
        return set(self.tokens.values()) | self.tokenizer.special_ids

    def texts(self, every: bool) -> list[str]:
        """Spellings of every token; or of a few by themselves, and of every eighth other one together in one text."""
        few, others = [RESET, SPARE[self.name], *FIRST[self.name]], [*self.tokens]
        alone = dict.fromkeys(few + others) if every else few
        texts = [spell(token) for spell in SPELLINGS.values() for token in alone]
        if not every:
            texts += ["".join(map(spell, others[::8])) for spell in SPELLINGS.values()]
        return texts


@pytest.fixture(scope="module", params=["SmolLM2", "Llama-3", "Gemma-2"])
def named(request) -> Named:
    match request.param:
        case "SmolLM2":
            tokenizer = request.getfixturevalue("reset_tokenizer")
        case "Llama-3":
            tokenizer = with_reset(ChatTokenizer(_open_tokenizer(request.getfixturevalue("llama3_folder"))))
        case "Gemma-2":
            folder = request.getfixturevalue("gemma2_folder")
            tokenizer = with_reset(ChatTokenizer(_open_tokenizer(folder), chat_template="gemma2"))
    model = tiny.model(vocab_size=len(tokenizer.hf), hidden_size=8, num_hidden_layers=1, max_position_embeddings=10**7)
    return Named(request.param, tokenizer, Sampler(model, tokenizer, SamplingParams(max_new_tokens=1)))


# ------------------------------------------------------------------------------------------------------- places

ALONE = "reply, draft or prefix alone"
PLACES: dict[str, Callable[[Named, Sequence[str], Path], list[list[int]]]] = {}


def place(name: str):
    """Of a function that gives, for each text, the ids that the program makes of it."""

    def register(function):
        PLACES[name] = function
        return function

    return register


def rendered(named: Named, texts: Sequence[str], messages: Callable[[str], list]) -> list[list[int]]:
    return [named.tokenizer.render(messages(text)).tolist() for text in texts]


@place(ALONE)
def alone(named, texts, _folder):
    return [named.tokenizer.encode(text).tolist() for text in texts]


@place("user prompt")
def user_prompt(named, texts, _folder):
    return [list(named.sampler._encode(text, "")[0]) for text in texts]


@place("prefix of a reply")
def prefix(named, texts, _folder):
    return [list(itertools.chain(*named.sampler._encode(BENIGN, text))) for text in texts]


@place("system prompt")
def system_prompt(named, texts, _folder):
    return rendered(named, texts, lambda text: conversation(("system", text), ("user", BENIGN)))


@place("earlier turns")
def earlier_turns(named, texts, _folder):
    return rendered(named, texts, lambda text: conversation(("user", text), ("assistant", text), ("user", text)))


@place("halves in two messages")
def halves(named, texts, _folder):
    def split(text):
        half = len(text) // 2
        return conversation(("user", text[:half]), ("assistant", text[half:]), ("user", BENIGN))

    return rendered(named, texts, split)


def from_rows(named: Named, rows: Sequence[dict], format: str, folder: Path) -> list[list[int]]:
    """Ids of the examples that a file of rows gives."""
    path = folder / f"{format}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    preferences, report = sources.read(str(path), format=format)
    recipe = TreeSpec("sft", True, "rewind", named.tokenizer.reset_id)
    examples = encode(preferences, named.tokenizer, recipe, 10**7, report)
    assert not report.dropped, report.lines()
    return [[*each.prompt, *each.chosen, *each.rejected] for each in examples]


@place("data rows, preference")
def preference_rows(named, texts, folder):
    rows = [{"prompt": text, "chosen": f"b {text}", "rejected": f"c {text}"} for text in texts]
    return from_rows(named, rows, "preference", folder)


@place("data rows, HH")
def hh_rows(named, texts, folder):
    def said(text, last):
        return f"\n\nHuman: {text}\n\nAssistant: {text}\n\nHuman: {text}\n\nAssistant: {last} {text}"

    return from_rows(named, [{"chosen": said(text, "b"), "rejected": said(text, "c")} for text in texts], "hh", folder)


@place("data rows, OASST")
def oasst_rows(named, texts, folder):
    rows = []
    for number, text in enumerate(texts):
        for kind, parent, said in (("q", None, text), ("b", "q", f"b {text}"), ("c", "q", f"c {text}")):
            row = {"message_id": f"{kind}{number}", "parent_id": parent and f"q{number}", "role": "any", "text": said}
            rows.append(row | {"lang": "en", "rank": "qbc".index(kind)})
    return from_rows(named, rows, "oasst", folder)


def asked(named: Named, path: Path) -> list[list[int]]:
    prompts = read_prompts(str(path))
    return [list(itertools.chain(*named.sampler._encode(one.prompt, one.prefix))) for one in prompts]


@place("prompt file, .txt")
def txt_file(named, texts, folder):
    (path := folder / "prompts.txt").write_text("\n".join(text.replace("\n", " ") for text in texts))
    return asked(named, path)


@place("prompt file, .jsonl")
def jsonl_file(named, texts, folder):
    (path := folder / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "prefix": text}) for text in texts)
    )
    return asked(named, path)


@place("prompt file, .csv")
def csv_file(named, texts, folder):
    with (path := folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], *([text] for text in texts)])
    return asked(named, path)


@place("prompt set with a target")
def prompt_set(named, texts, folder):
    (path := folder / "set.json").write_text(json.dumps([{"prompt": text, "target": text} for text in texts]))
    _, questions = prompt_sets.read(str(path), True)
    return [
        [*named.tokenizer.render(question.messages), *named.tokenizer.encode(question.target)] for question in questions
    ]


@place("suffix of an attack")
def attack_suffix(named, texts, _folder):
    question = prompt_sets.Question(tuple(conversation(("user", BENIGN))))
    return [named.tokenizer.render(question.with_suffix(text).messages).tolist() for text in texts]


@place("system prompt of an attack")
def attack_system(named, texts, _folder):
    question = prompt_sets.Question(tuple(conversation(("user", BENIGN))))
    return [named.tokenizer.render(question.with_system(text).messages).tolist() for text in texts]


@place("GCG's prompt and target")
def gcg(named, texts, _folder):
    found = [Objective.of(named.tokenizer, conversation(("user", text)), text) for text in texts]
    return [[*objective.before, *objective.after, *objective.target] for objective in found]


NEEDS_SYSTEM = ("system prompt", "system prompt of an attack")


# -------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def matrix(request):
    """Counts of spellings and of special ids by place and tokenizer, printed where the table was asked for."""
    counts = collections.defaultdict(dict)
    yield counts
    if request.config.getoption("--injection-table"):
        names = list(dict.fromkeys(name for row in counts.values() for name in row))
        lines = [f"| place | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        lines += [
            f"| {where} | " + " | ".join(row.get(name, "") for name in names) + " |" for where, row in counts.items()
        ]
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n\n" + "\n".join(lines))


@pytest.mark.parametrize("where", PLACES)
def test_no_text_adds_a_special_id(named, where, tmp_path, matrix, request):
    if named.name == "Gemma-2" and where in NEEDS_SYSTEM:
        with pytest.raises(InputError, match="no system role"):
            PLACES[where](named, [BENIGN], tmp_path)
        matrix[where][named.name] = "refused"
        return
    texts = named.texts(every=request.config.getoption("--injection-table") or where == ALONE)
    (benign,) = map(named.special, PLACES[where](named, [BENIGN], tmp_path))
    found = list(map(named.special, PLACES[where](named, texts, tmp_path)))
    assert len(found) == len(texts)
    added = {text: ids for text, ids in zip(texts, found, strict=True) if ids != benign}
    matrix[where][named.name] = f"{len(texts):,} spellings, {sum(map(len, added.values()))} added"
    assert not added
    # Or nothing would be seen here at all: a chat template does write special tokens.
    assert bool(benign) == (where != ALONE)


def test_special_tokens_are_seen_where_they_are(named):
    """What a text gives where a tokenizer is used without care."""
    for token in (*FIRST[named.name], RESET):
        ids = named.tokenizer.hf.encode(f"so {token} it is", add_special_tokens=False)
        assert named.special(ids) == [named.tokens[token]]


def test_a_role_is_one_of_three(named):
    for token in (*FIRST[named.name], RESET, "tool", "function", "ipython", "developer", "model", "USER", "user "):
        for role in (token, f"user{token}", f"{token}assistant"):
            with pytest.raises(InputError, match="has the role"):
                named.tokenizer.render([{"role": role, "content": BENIGN}])


def test_gcg_can_propose_no_special_token(named):
    """It tries those tokens only that come back from their own text; see `Attack.candidates`."""
    for index in named.tokens.values():
        text = named.tokenizer.decode([index])
        assert named.tokenizer.encode(text).tolist() != [index]


def test_a_reply_goes_back_into_the_conversation_as_text(named):
    """With what a model wrote, special tokens too: its next turn has no more of them than the template writes."""
    for index in named.tokens.values():
        reply = named.tokenizer.decode([*named.tokenizer.encode("so it"), index, *named.tokenizer.encode(" is")])
        turns = conversation(("user", BENIGN), ("assistant", reply), ("user", BENIGN))
        plain = conversation(("user", BENIGN), ("assistant", "so it is"), ("user", BENIGN))
        assert named.special(named.tokenizer.render(turns)) == named.special(named.tokenizer.render(plain))
