"""An export resets in transformers as it does here: the same tokens, drafts and resets as our own sampling loop."""

import ast
import csv
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.models.assign import assign
from jax_backtrack.sampling.batching import Request
from jax_backtrack.sampling.settings import StaticParams
from tests import tiny
from tests.chat_tokenizers import small_tokenizer
from tests.decoding import engine, sample, traced

RESET_MODES = ("keep", "rewind", "resample")
DETERMINISTIC = {"keep": {}, "rewind": {}, "resample": {"do_sample": True, "top_k": 1}}


def exported(model, tokenizer, folder) -> SimpleNamespace:
    """A model as we have it and as transformers reads our export of it."""
    save(model, tokenizer, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return SimpleNamespace(folder=str(folder), tokenizer=tokenizer, theirs=theirs, ours=model)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def small(request, tmp_path_factory):
    """A random tiny model of each family, not trained for any context."""
    tokenizer = small_tokenizer()
    model = tiny.model(seed=1, vocab_size=len(tokenizer.hf), **tiny.FAMILIES[request.param])
    return exported(model, add_reset(model, tokenizer), tmp_path_factory.mktemp("small") / request.param)


@pytest.fixture(scope="module")
def smollm(smollm_gguf, tmp_path_factory):
    """SmolLM2, saying [RESET] where it would put a comma: at many different steps, and in some replies never."""
    model, tokenizer = load(smollm_gguf)
    tokenizer = add_reset(model, tokenizer)
    table_VxM = model.embedding_VxM[...]
    (comma,) = tokenizer.encode(",")
    assign(model.embedding_VxM, table_VxM.at[tokenizer.reset_id].set(table_VxM[comma]))
    return exported(model, tokenizer, tmp_path_factory.mktemp("smollm") / "export")


def by_us(pair, prompts, mode, *, max_resets, bias, new_tokens, prefixes=None):
    """Prompt and reply, and the drafts, of each prompt: lists of ids."""
    prefixes = prefixes or [[] for _ in prompts]
    requests = [
        Request(number, np.asarray(prompt, np.int32), np.asarray(prefix, np.int32), seed=number)
        for number, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True))
    ]
    reset_id = pair.tokenizer.reset_id
    stops, unused = pair.tokenizer.special_ids - {reset_id}, pair.tokenizer.unused_ids(pair.ours.config.vocab_size)
    plan = StaticParams(mode, reset_id, tuple(sorted(stops)), unused_ids=unused)
    ours = engine(pair.ours, plan, traced(max_resets=max_resets, bias=bias))
    longest = max(request.length for request in requests)
    written = sample(ours, requests, rows=len(requests), ring=new_tokens, prompt=longest)
    found = []
    for row, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
        ids = np.array([*prefix, *written[row]], np.int32)
        first, *others = np.split(ids, np.flatnonzero(ids == reset_id))
        *drafts, reply = [first.tolist(), *(other[1:].tolist() for other in others)]
        found.append(([*map(int, prompt), *reply], drafts))
    return found


def padded(pair, rows, side="left"):
    width = max(map(len, rows))
    pad = pair.theirs.generation_config.pad_token_id or 0
    fill = [(width - len(row)) for row in rows]
    ids = [[pad] * n + [*row] if side == "left" else [*row] + [pad] * n for row, n in zip(rows, fill, strict=True)]
    mask = [
        [0] * n + [1] * len(r) if side == "left" else [1] * len(r) + [0] * n for r, n in zip(rows, fill, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def call(pair, inputs, **settings):
    return pair.theirs.generate(
        **inputs, custom_generate=pair.folder, trust_remote_code=True, return_dict_in_generate=True, **settings
    )


def by_transformers(pair, prompts, mode, *, max_resets, bias, new_tokens, prefixes=None, side="left", batch=64):
    """As `by_us`, by the generate of transformers with the code that lies in the export."""
    prefixes = prefixes or [[] for _ in prompts]
    found = []
    for first in range(0, len(prompts), batch):
        chosen = slice(first, first + batch)
        rows = [[*prompt, *prefix] for prompt, prefix in zip(prompts[chosen], prefixes[chosen], strict=True)]
        inputs = padded(pair, rows, side)
        output = call(
            pair,
            inputs,
            reset_mode=mode,
            max_resets=max_resets,
            reset_bias=bias,
            max_new_tokens=new_tokens,
            prefix_length=[len(prefix) for prefix in prefixes[chosen]],
            **DETERMINISTIC[mode],
        )
        width = inputs["input_ids"].shape[1]
        assert output.resets.tolist() == [len(drafts) for drafts in output.drafts]
        for row, ids, drafts in zip(rows, output.sequences.tolist(), output.drafts, strict=True):
            found.append((ids[width - len(row) :], drafts))
    return found


def assert_equal(pair, theirs, ours):
    """Equal but for padding behind a reply."""
    pads = {pair.theirs.generation_config.pad_token_id, min(pair.tokenizer.special_ids - {pair.tokenizer.reset_id})}
    for number, ((sequence, drafts), (our_sequence, our_drafts)) in enumerate(zip(theirs, ours, strict=True)):
        assert drafts == our_drafts, number
        assert sequence[: len(our_sequence)] == our_sequence, number
        assert set(sequence[len(our_sequence) :]) <= pads, number


def real_prompts(shared, tokenizer) -> list:
    """24 questions of three kinds, rendered, none longer than 26 tokens."""
    folder = shared / "data" / "prompts"
    with (folder / "xstest.csv").open() as xstest, (folder / "advbench.csv").open() as advbench:
        kinds = [[row["prompt"] for row in csv.DictReader(xstest)][::20]]
        kinds += [[row["goal"] for row in csv.DictReader(advbench)][::13]]
    kinds += [[json.loads(line)["turns"][0] for line in (folder / "mt_bench_question.jsonl").read_text().splitlines()]]
    system = {"role": "system", "content": ""}
    prompts = []
    for texts in kinds:
        rendered = (tokenizer.render([system, {"role": "user", "content": text}]).tolist() for text in texts)
        prompts += itertools.islice((ids for ids in rendered if len(ids) <= 26), 11)
    return prompts


@pytest.mark.parametrize("mode", RESET_MODES)
def test_smollm2_resets_in_transformers_as_here(smollm, shared, mode):
    prompts = real_prompts(shared, smollm.tokenizer)
    assert len(prompts) == 24 and len({len(prompt) for prompt in prompts}) > 5
    settings = dict(max_resets=2, bias=1.5, new_tokens=16)
    ours = by_us(smollm, prompts, mode, **settings)
    assert_equal(smollm, by_transformers(smollm, prompts, mode, **settings), ours)
    resets = [len(drafts) for _, drafts in ours]
    seen = (0, 2) if mode == "resample" else (0, 1, 2)  # there the same draft comes again: one reset is never alone
    assert min(resets.count(number) for number in seen) >= 2, resets
    assert len({len(drafts[0]) for _, drafts in ours if drafts}) > 5


def random_rows(shortest: int, longest: int, rows: int = 6, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 250, length).tolist() for length in rng.integers(shortest, longest + 1, rows)]


PROMPTS, PREFIXES = random_rows(3, 9), random_rows(0, 4, seed=1)
TIPPING, ALWAYS = 2.0, 1e9  # biases at which the tiny models reset in some rows at some steps, and at once


@pytest.mark.parametrize("mode", RESET_MODES)
@pytest.mark.parametrize("side,batch", [("left", 6), ("right", 6), ("left", 1)])
def test_a_reset_takes_the_prefix_back_too(small, mode, side, batch):
    settings = dict(max_resets=3, bias=TIPPING, new_tokens=12, prefixes=PREFIXES)
    ours = by_us(small, PROMPTS, mode, **settings)
    assert_equal(small, by_transformers(small, PROMPTS, mode, side=side, batch=batch, **settings), ours)
    assert len({len(drafts) for _, drafts in ours}) > 1
    assert all(drafts[0][: len(prefix)] == prefix for (_, drafts), prefix in zip(ours, PREFIXES, strict=True) if drafts)


@pytest.mark.parametrize("mode", RESET_MODES)
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_a_budget_may_end_at_a_reset(small, mode, new_tokens):
    """Three resets at once. Where they stay in the context, up to three tokens the reply is empty and the fourth is one
    of a reply; where they do not, the reply has the whole budget."""
    settings = dict(max_resets=3, bias=ALWAYS, new_tokens=new_tokens)
    theirs = by_transformers(small, PROMPTS, mode, **settings)
    for (sequence, drafts), prompt in zip(theirs, PROMPTS, strict=True):
        assert drafts == [[]] * (min(new_tokens, 3) if mode == "keep" else 3)
        written = new_tokens // 4 if mode == "keep" else new_tokens
        assert sequence[: len(prompt)] == prompt and len(sequence) == len(prompt) + written
    assert_equal(small, theirs, by_us(small, PROMPTS, mode, **settings))


def test_without_resets_it_is_a_plain_generate(small):
    """Greedy and sampled by the same seed; [RESET] is masked, and so are ids that no token has."""
    inputs = padded(small, PROMPTS)
    unused = [index for run in small.tokenizer.unused_ids(small.ours.config.vocab_size) for index in range(*run)]
    assert unused
    for sampling in ({}, {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9}):
        settings = dict(max_new_tokens=10, **sampling)
        torch.manual_seed(5)
        mine = call(small, inputs, max_resets=0, reset_bias=ALWAYS, **settings)
        torch.manual_seed(5)
        stops = sorted(small.tokenizer.special_ids - {small.tokenizer.reset_id})
        plain = small.theirs.generate(
            **inputs,
            suppress_tokens=[small.tokenizer.reset_id, *unused],
            eos_token_id=stops,
            pad_token_id=min(stops),
            **settings,
        )
        width = inputs["input_ids"].shape[1]
        assert torch.equal(mine.sequences[:, width:], plain[:, width:]) and mine.resets.tolist() == [0] * 6


@pytest.mark.parametrize("mode", RESET_MODES)
def test_ids_without_a_token_are_never_drawn(small, mode):
    """At a temperature at which a plain `generate` draws them."""
    runs = small.tokenizer.unused_ids(small.ours.config.vocab_size)
    assert small.theirs.config.backtracking["unused_token_ids"] == [list(run) for run in runs]
    inputs = padded(small, PROMPTS * 4)
    settings = dict(do_sample=True, temperature=3.0, top_k=0, max_new_tokens=16)

    def drawn(tokens):
        return sum(((tokens >= first) & (tokens < behind)).sum().item() for first, behind in runs)

    torch.manual_seed(0)
    assert drawn(small.theirs.generate(**inputs, **settings)) > 0
    output = call(small, inputs, reset_mode=mode, max_resets=2, reset_bias=TIPPING, **settings)
    drafts = [token for drafts in output.drafts for draft in drafts for token in draft]
    assert drafts and drawn(output.sequences) == drawn(torch.tensor(drafts)) == 0
    # Those of the caller are masked besides.
    suppressed = call(small, inputs, max_resets=0, suppress_tokens=list(range(200)), **settings).sequences
    new = suppressed[:, inputs["input_ids"].shape[1] :]
    pad = small.theirs.generation_config.pad_token_id or 0
    assert drawn(new) == 0 and ((new >= 200) | (new == pad)).all()


def test_resets_are_sampled(small):
    """By the same seed the same, and a bias between never and always gives both."""
    inputs = padded(small, PROMPTS * 4)
    settings = dict(do_sample=True, reset_bias=1.5, max_resets=2, max_new_tokens=10, reset_mode="resample")
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(call(small, inputs, **settings))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences) and outputs[0].drafts == outputs[1].drafts
    assert {0, 2} <= set(outputs[0].resets.tolist()) <= {0, 1, 2}


def test_lengths_and_forms_of_a_call(small):
    """`max_length`, a `generation_config`, `inputs`, no mask, and a tensor where no dictionary is asked for."""
    ids = torch.tensor([PROMPTS[0], PROMPTS[0]])
    expected = call(small, {"input_ids": ids}, max_new_tokens=5, reset_bias=TIPPING).sequences
    width = ids.shape[1]
    settings = dict(custom_generate=small.folder, trust_remote_code=True, reset_bias=TIPPING)
    config = transformers.GenerationConfig(max_new_tokens=5)
    for found in (
        small.theirs.generate(inputs=ids, max_length=width + 5, **settings),
        small.theirs.generate(ids, generation_config=config, tokenizer=small.tokenizer.hf, **settings),
    ):
        assert torch.equal(found, expected)
    assert config.to_dict() == transformers.GenerationConfig(max_new_tokens=5).to_dict()
    long = small.theirs.generate(ids, max_resets=0, **settings)
    assert width + 20 < long.shape[1] <= width + 256


def test_code_trusted_at_loading_makes_it_the_generate_of_the_model(small):
    inputs = padded(small, PROMPTS)
    expected = call(small, inputs, max_new_tokens=6, reset_bias=TIPPING)
    model = transformers.AutoModelForCausalLM.from_pretrained(small.folder, trust_remote_code=True)
    again = model.generate(**inputs, max_new_tokens=6, reset_bias=TIPPING)
    assert torch.equal(again, expected.sequences)
    settings = dict(max_new_tokens=6, reset_bias=TIPPING, custom_generate=small.folder, trust_remote_code=True)
    assert torch.equal(model.generate(**inputs, **settings), expected.sequences)
    mask = inputs["attention_mask"]
    by_place = model.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=6, reset_bias=TIPPING)
    assert torch.equal(by_place, expected.sequences)


def test_every_special_token_ends_a_reply_and_the_caller_s_processors_hold(small):
    start_id = small.tokenizer.hf.convert_tokens_to_ids("<|im_start|>")
    assert start_id != small.tokenizer.eot_id

    def say_start(input_ids, scores):
        scores[:, start_id] = ALWAYS
        return scores

    output = call(small, padded(small, PROMPTS), logits_processor=[say_start], max_new_tokens=6)
    assert output.sequences[:, max(map(len, PROMPTS)) :].tolist() == [[start_id]] * 6


def test_padding_by_an_ordinary_token_ends_nothing(small):
    """Models without a padding token are often padded by some other one."""
    inputs = padded(small, PROMPTS[:1])
    settings = dict(max_new_tokens=8, reset_bias=TIPPING)
    expected = call(small, inputs, **settings)
    said = expected.sequences[0, inputs["input_ids"].shape[1]].item()
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}  # as tokenizers of transformers 4 give them
    found = call(small, inputs | types, pad_token_id=said, **settings)
    assert found.sequences[0].tolist() == expected.sequences[0].tolist() and found.drafts == expected.drafts
    with pytest.raises(ValueError, match="pad_token_id is the id of \\[RESET\\]"):
        call(small, inputs, pad_token_id=small.tokenizer.reset_id, **settings)


@pytest.mark.parametrize("given", [False, None])
def test_transformers_runs_no_code_that_is_not_trusted(small, given):
    with pytest.raises(ValueError, match="trust_remote_code"):
        small.theirs.generate(**padded(small, PROMPTS), custom_generate=small.folder, trust_remote_code=given)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"num_beams": 2}, "num_beams is not supported"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences is not supported"),
        ({"streamer": "one"}, "streamer is not supported"),
        ({"assistant_model": "another"}, "assistant_model is not supported"),
        ({"output_scores": True}, "output_scores is not supported"),
        ({"min_new_tokens": 3}, "min_new_tokens is not supported"),
        ({"position_ids": torch.arange(9)}, "position_ids is not supported"),
        ({"reset_mode": "rewnd"}, "reset_mode is 'rewnd'"),
        ({"reset_mode": "resample"}, "needs do_sample=True"),
        *(
            ({"max_resets": wrong}, f"max_resets is {re.escape(repr(wrong))}; it must be a whole number of at least 0")
            for wrong in (-1, "1", 1.0, True, None, [1], "one")
        ),
        *(
            ({"reset_bias": wrong}, f"reset_bias is {re.escape(repr(wrong))}; it must be a finite number")
            for wrong in ("-4", None, True, [0.0], float("inf"), float("nan"))
        ),
        *(
            ({"prefix_length": wrong}, f"prefix_length has {shown}; it must be a whole number")
            for wrong, shown in (
                ("1", "'1'"),
                (1.0, "1.0"),
                (True, "True"),
                (None, "None"),
                ([1, 1, 1, 1, 1, "1"], "'1'"),
            )
        ),
        ({"reset_mode": ""}, "reset_mode is ''"),
        ({"reset_mode": 1}, "reset_mode is 1"),
        ({"max_new_tokens": 0}, "max_new_tokens` must be greater than 0"),
        ({"max_length": 8}, "max_length leaves 0 tokens"),
        ({"prefix_length": 3}, "prefix_length is 3 in a row of 3 tokens"),
        ({"prefix_length": [1, 2]}, "2 numbers for 6 rows"),
        ({"attention_mask": torch.ones(6, 2)}, "attention_mask is"),
        ({"attention_mask": None, "pad_token_id": 0}, "give the attention_mask"),
        ({"input_ids": torch.arange(5)}, "input_ids must be a tensor"),
        ({"max_reset": 1}, "max_reset"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(small, settings, message):
    with pytest.raises(ValueError, match=message):
        call(small, padded(small, PROMPTS) | settings)


def test_a_context_that_the_model_was_not_trained_for_is_refused(small, tmp_path):
    config = json.loads((Path(small.folder) / "config.json").read_text())
    assert "reset_mode" not in config["backtracking"]
    ids = {"input_ids": torch.tensor([PROMPTS[0]])}
    model = transformers.AutoModelForCausalLM.from_pretrained(small.folder)
    pair = SimpleNamespace(theirs=model, folder=small.folder)
    model.config.backtracking = config["backtracking"] | {"reset_mode": "rewind"}
    with pytest.raises(ValueError, match="trained with 'rewind'"):
        call(pair, ids, reset_mode="keep")
    call(pair, ids, reset_mode="resample", do_sample=True, max_new_tokens=2)
    model.config.backtracking = config["backtracking"] | {"reset_mode": "resample"}
    call(pair, ids, reset_mode="keep", max_new_tokens=2)
    with pytest.raises(ValueError, match="needs do_sample=True"):
        call(pair, ids)
    del model.config.backtracking
    with pytest.raises(ValueError, match="has no \\[RESET\\]"):
        call(pair, ids)


def test_a_model_without_reset_carries_no_code(tmp_path):
    tokenizer = small_tokenizer()
    pair = exported(tiny.model(vocab_size=len(tokenizer.hf)), tokenizer, tmp_path / "plain")
    assert not (tmp_path / "plain" / "custom_generate").exists()
    with pytest.raises(OSError, match="custom_generate"):
        call(pair, {"input_ids": torch.tensor([PROMPTS[0]])})


def test_the_code_needs_torch_and_transformers_only(small):
    tree = ast.parse((Path(small.folder) / "custom_generate" / "generate.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"copy", "dataclasses", "torch", "transformers"}
