"""The sampler equals naive recomputation: every token from scratch on the row's own context, resets included."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs import base
from jax_backtrack import Finished, Retraction, Sampler, SamplingParams, TextDelta
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.models.transformer import Compute
from jax_backtrack.sampling import loop
from jax_backtrack.sampling.batching import ContinuousBatch, Request, group_by_length, pad_to_bucket, shared_prefix
from jax_backtrack.sampling.build import recipe_sampler
from jax_backtrack.sampling.replies import Writing
from jax_backtrack.sampling.seeds import reply_seeds
from jax_backtrack.sampling.streams import _certain, _whole
from tests import tiny
from tests.chat_tokenizers import small_tokenizer
from tests.decoding import (
    GREEDY,
    MODELS,
    NEW,
    PROMPT,
    SAMPLED,
    E,
    R,
    both,
    causal_logits,
    engine,
    forced_at,
    logits_of,
    naive,
    requests,
    sample,
    traced,
)

every_family = pytest.mark.parametrize("family", MODELS)
every_mode = pytest.mark.parametrize("mode", ["keep", "rewind", "resample"])


@every_family
@every_mode
@pytest.mark.parametrize("place", range(NEW))
def test_a_reset_at_every_place_equals_naive_recomputation(family, mode, place):
    """Rows reset at different times, one of them twice, one of them never. Gemma-2's window is shorter than prompts.

    Drafts and replies together are longer than the ring, which so goes round.
    """
    plan = dataclasses.replace(GREEDY, reset_mode=mode)
    forced = traced(bias=forced_at([place], [2 + place // 2, 3 + place // 2], []))
    written, expected = both(requests(), plan, forced, family)
    assert written == expected
    # Where the position comes back to the place, [RESET] is forced once more. A reply may end before it comes there.
    again = mode == "resample" or (mode == "rewind" and place > 0)
    assert expected[0].count(R) == (2 if again else 1) or expected[0][-1] == E


@every_family
def test_layers_in_a_scan_equal_unstacked(family):
    plan = dataclasses.replace(SAMPLED, reset_mode="rewind")
    turned = traced(bias=3.0, temperature=1.7)
    written, expected = both(requests(4), plan, turned, family, unstacked=False)
    assert written == expected


CUTS = {
    "all": ({}, {}),
    "top k": (dict(top_k=5), {}),
    "top p": ({}, dict(top_p=0.7)),
    "min p": ({}, dict(min_p=0.05)),
    "penalty": ({}, dict(repetition_penalty=1.8)),
    "every cut": (dict(top_k=9), dict(top_p=0.8, min_p=0.1, repetition_penalty=1.3)),
}


@every_family
@every_mode
@pytest.mark.parametrize("cut", CUTS)
def test_sampling_equals_naive_recomputation(family, mode, cut):
    planned, turned = CUTS[cut]
    plan = dataclasses.replace(SAMPLED, reset_mode=mode, used=SAMPLED.used.union(turned), **planned)
    turned = traced(bias=3.0, temperature=1.7, **turned)
    written, expected = both(requests(4), plan, turned, family)
    assert written == expected
    assert any(R in row for row in expected)


UNUSED = ((7, 8), (20, 31), (tiny.VOCAB - 9, tiny.VOCAB))


@every_family
@every_mode
@pytest.mark.parametrize("cut", ["greedy", "all", "every cut"])
def test_ids_without_a_token_are_never_drawn(family, mode, cut):
    """As naive recomputation, and at a temperature at which they are drawn where they are not masked."""
    planned, turned = CUTS.get(cut, ({}, {}))
    used = (GREEDY if cut == "greedy" else SAMPLED).used.union(turned)
    plan = dataclasses.replace(SAMPLED, reset_mode=mode, used=used, unused_ids=UNUSED, **planned)
    turned = traced(bias=3.0, temperature=3.0, **turned)
    written, expected = both(requests(4), plan, turned, family)
    assert written == expected
    masked = {index for run in UNUSED for index in range(*run)}
    assert not masked & {token for row in written for token in row}
    plain, _ = both(requests(4), dataclasses.replace(plan, unused_ids=()), turned, family)
    assert masked & {token for row in plain for token in row}


def test_log_probs_are_those_of_the_model_with_all_its_rows():
    plan = dataclasses.replace(SAMPLED, reset_mode="rewind", logprobs=True, unused_ids=UNUSED)
    (asked,) = requests(1)
    batch = ContinuousBatch(engine(MODELS["llama"], plan, traced(max_resets=0)), 1, PROMPT, NEW, ())
    updates = [update for updates in batch.run([asked]) for update in updates]
    tokens = [token for update in updates for token in update.ids.tolist()]
    found = np.concatenate([update.logprobs for update in updates])
    for place, token in enumerate(tokens):
        logits = logits_of("llama")([*asked.ids.tolist(), *tokens[:place]])
        assert abs(found[place] - (logits[token] - np.log(np.exp(logits.astype(np.float64)).sum()))) < 1e-4


def test_max_resets_masks_reset():
    for most in range(4):
        written, _ = both(requests(), GREEDY, traced(max_resets=most, bias=1e9))
        assert [row.count(R) for row in written] == [most] * 3
        assert all(row[:most] == [R] * most for row in written)


@pytest.mark.parametrize("mode,count", [("rewind", 500), ("keep", 23), ("resample", 23)])
def test_many_prompts_through_few_rows_equal_each_alone(mode, count):
    """Rows are given prompts again and again while others go on; the loop stops and goes on at other places."""
    plan = dataclasses.replace(SAMPLED, reset_mode=mode)
    turned = traced(bias=2.0, temperature=1.3)
    asked = [dataclasses.replace(one, seed=number) for number, one in enumerate(requests(count, seed=5))]
    made = engine(MODELS["gemma2"], plan, turned)
    alone = [sample(made, [one], 4, NEW)[0] for one in asked]
    assert sample(made, asked, 4, NEW) == alone
    assert sample(made, asked[::-1], 4, NEW, steps=2) == alone[::-1]
    assert any(R in row for row in alone)


@every_family
@pytest.mark.parametrize("unstacked", [True, False], ids=["unstacked", "scanned"])
def test_a_beginning_that_is_read_once_changes_nothing(family, unstacked):
    """With every cut, so that what the penalty sees of the beginning counts; Gemma-2's window ends inside of it."""
    planned, turned = CUTS["every cut"]
    plan = dataclasses.replace(SAMPLED, reset_mode="resample", used=SAMPLED.used.union(turned), **planned)
    made = engine(MODELS[family], plan, traced(bias=3.0, temperature=1.7, **turned), unstacked)
    begun = np.random.default_rng(3).integers(5, tiny.VOCAB, 8, dtype=np.int32)
    asked = [
        dataclasses.replace(one, prompt_ids=np.concatenate([begun, one.prompt_ids])) for one in requests(9, seed=2)
    ]
    assert shared_prefix(asked).tolist() == begun.tolist()
    alone = [sample(made, [one], 2, NEW, prompt=16)[0] for one in asked]
    assert sample(made, asked, 2, NEW, prompt=16, prefix=begun) == alone


def test_a_common_beginning_leaves_every_prompt_a_token():
    def found(*prompts):
        nothing = np.zeros(0, np.int32)
        return len(shared_prefix([Request(i, np.asarray(ids), nothing, i) for i, ids in enumerate(prompts)]))

    ids = list(range(5, 60))
    assert found(ids[:20], [*ids[:20], 1], [*ids[:20], 2]) == 16
    assert found(ids[:16], [*ids[:16], 1], [*ids[:16], 2]) == 8
    assert found(ids, ids, [*ids, 1]) == 0 == found(ids[:9], ids[1:9], ids)


def test_samples_of_one_prompt_are_read_once():
    plan = dataclasses.replace(SAMPLED, reset_mode="rewind")
    one, other = requests(2, seed=3)
    asked = [dataclasses.replace(one, number=number, seed=number) for number in range(11)]
    asked += [dataclasses.replace(other, number=11 + number, seed=number) for number in range(5)]
    made = engine(MODELS["llama"], plan, traced(temperature=1.5, bias=1.0))
    reads = []
    batch = ContinuousBatch(made, 4, PROMPT, NEW)
    prefill = batch._prefill
    batch._prefill = lambda each: (reads.extend(one.number for one, _ in each.values()), prefill(each))
    written = {}
    for updates in batch.run(asked):
        for update in updates:
            written.setdefault(update.number, []).extend(update.ids.tolist())
    assert reads == [0, 11]
    assert [written[number] for number in range(16)] == [sample(made, [one], 4, NEW)[0] for one in asked]


def test_a_cancelled_row_is_given_the_next_prompt():
    made = engine(MODELS["llama"], GREEDY, traced(max_resets=0))
    asked = requests(5)
    batch, written = ContinuousBatch(made, 1, PROMPT, NEW), {}
    for updates in batch.run(asked, steps=2):
        for update in updates:
            written.setdefault(update.number, []).extend(update.ids.tolist())
            batch.cancel(update.number)
    assert [written[number] for number in range(5)] == [row[:2] for row in sample(made, asked, 1, NEW)]


def test_log_probs_are_the_models_own():
    plan = dataclasses.replace(SAMPLED, reset_mode="rewind", logprobs=True, top_k=3)
    made = engine(MODELS["llama"], plan, traced(bias=3.0, temperature=0.7))
    (asked,) = requests(1)
    for (update,) in ContinuousBatch(made, 1, PROMPT, NEW).run([asked]):
        ids, logprobs, reset_logprobs = update.ids.tolist(), update.logprobs, update.reset_logprobs
    context = asked.ids.tolist()
    for token, logprob, reset_logprob in zip(ids, logprobs, reset_logprobs, strict=True):
        expected = np.asarray(jax.nn.log_softmax(logits_of("llama")(context)))
        np.testing.assert_allclose([logprob, reset_logprob], expected[[token, R]], atol=1e-4)
        context = [*asked.prompt_ids.tolist(), R] if token == R else [*context, token]


@pytest.mark.parametrize("where", ["anywhere", "on a mesh of one device"])
def test_one_compilation_for_any_number_of_resets_and_prompts(where):
    plan, model = dataclasses.replace(GREEDY, reset_mode="rewind", steps=NEW - 1), tiny.model(seed=4)
    if where != "anywhere":
        mesh = make_mesh(devices=jax.devices()[:1])
        model.compute = Compute(mesh=mesh)
        nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, PartitionSpec())))
    programs = loop.decode, loop.prefill, loop.insert, loop.clone_slot
    for program in programs:
        program.clear_cache()
    for most in range(4):
        for bias in (0.0, 1e9):
            asked = requests(7, seed=most)
            sample(engine(model, plan, traced(max_resets=most, bias=bias)), [*asked, asked[-1]], 3, NEW)
    assert [program._cache_size() for program in programs] == [1, 1, 1, 1]


def test_pools_hold_every_request_once_and_short_prompts_apart():
    lengths = [*[10] * 17, *[100] * 17, *[30] * 3, 400]
    asked = [Request(i, np.zeros(n, np.int32), np.zeros(0, np.int32), i) for i, n in enumerate(lengths)]
    found = group_by_length(asked, slots=2)
    assert [[one.length for one in pool] for pool in found] == [[400], [*[100] * 17, *[30] * 3], [10] * 17]
    assert sorted(one.number for pool in found for one in pool) == list(range(38))
    assert len(group_by_length(asked, slots=16)) == 1


def test_buckets_are_at_most_half_as_long_again():
    assert all(length <= pad_to_bucket(length) <= max(length + 7, 1.5 * length) for length in range(1, 5000))
    assert sorted({pad_to_bucket(length) for length in range(1, 257)}) == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256]


@pytest.fixture(scope="module")
def smollm_shaped():
    """A tiny model with SmolLM2's vocabulary, for SmolLM2's tokenizer."""
    return tiny.model(vocab_size=49152)


def test_drafts_and_reply_are_told_apart(smollm_shaped, reset_tokenizer):
    """With [RESET] forced twice at once, both drafts hold nothing but the prefix, and the reply has no trace of it."""
    sampler = Sampler(
        smollm_shaped, reset_tokenizer, SamplingParams(max_resets=2, reset_bias=1e9, max_new_tokens=6, max_num_seqs=2)
    )
    replies = sampler(["hello", "there", "you"], prefills=["Well, I", "", "Sure"])
    assert [reply.drafts for reply in replies] == [("Well, I", ""), ("", ""), ("Sure", "")]
    assert all(reply.resets == 2 and "RESET" not in reply.text and reply.finish_reason == "length" for reply in replies)


def test_the_prefix_is_part_of_a_reply_without_resets(smollm_shaped, reset_tokenizer):
    sampler = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(max_resets=0, max_new_tokens=4, max_num_seqs=2))
    (reply,) = sampler(["hello"], prefills=["Well, I"])
    assert reply.text.startswith("Well, I") and not reply.drafts


def test_a_model_without_reset_never_resets(smollm_shaped, tokenizer):
    assert tokenizer.reset_id is None
    sampler = Sampler(
        smollm_shaped, tokenizer, SamplingParams(reset_bias=1e9, max_resets=3, max_new_tokens=4, max_num_seqs=2)
    )
    assert [reply.resets for reply in sampler(["a", "b"])] == [0, 0]


def test_every_special_token_but_reset_ends_a_reply(smollm_shaped, reset_tokenizer):
    stops = Sampler(smollm_shaped, reset_tokenizer)._engine.static.stop_ids
    assert {0, 1, reset_tokenizer.eot_id} <= set(stops) and reset_tokenizer.reset_id not in stops


def test_replies_come_in_order_and_by_seed_whatever_the_batch(smollm_shaped, reset_tokenizer):
    asked = [f"question {'x ' * (17 * i % 11)}" for i in range(7)]
    settings = dict(temperature=1.0, max_new_tokens=5, max_resets=1)
    alone = [
        Sampler(smollm_shaped, reset_tokenizer, SamplingParams(max_num_seqs=4, **settings))([one], seeds=[seed])[0]
        for seed, one in zip(reply_seeds(0, 7), asked, strict=True)
    ]
    seen = []
    together = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(max_num_seqs=4, **settings))(
        asked, progress=seen.append
    )
    assert together == alone and sum(seen) == 7


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"reset_mode": "rewnd"}, "did you mean 'rewind'"),
        ({"reset_mode": "resample"}, "temperature above 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 10**6}, "top_k is 1000000; it must be at most 49152"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 250}, "exceed the model's 256 positions"),
        ({"max_resets": -1}, "max_resets is -1"),
        *(
            ({"max_resets": wrong}, "max_resets is .*; it must be a whole number")
            for wrong in ("1", 1.0, True, None, [1])
        ),
        ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0; it must be a whole number"),
        ({"top_k": "5"}, "top_k is '5'; it must be a whole number"),
        ({"temperature": "1"}, "temperature is '1'; it must be a finite number"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"top_p": None}, "top_p is None; it must be a finite number"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"reset_bias": "-4"}, "reset_bias is '-4'; it must be a finite number"),
        ({"reset_bias": None}, "reset_bias is None; it must be a finite number"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"stop_strings": "end"}, "stop_strings is 'end'"),
        ({"stop_strings": [""]}, "not empty"),
        ({"cache_dtype": "float23"}, "did you mean 'float32'"),
        ({"reset_bias": []}, "reset_bias is \\[\\]"),
        ({"reset_bias": float("nan")}, "a finite number"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(smollm_shaped, reset_tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        reset_mode = settings.get("reset_mode")
        params = SamplingParams(**{name: value for name, value in settings.items() if name != "reset_mode"})
        Sampler(smollm_shaped, reset_tokenizer, params, reset_mode=reset_mode)(["hello"])


def test_a_call_takes_what_it_does_not_say_from_the_params(smollm_shaped, reset_tokenizer):
    settings = dict(max_new_tokens=6, temperature=1.0, max_resets=0)
    plain = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(**settings))
    sampler = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(n=2, seed=5, hold_back=9, **settings))
    replies = sampler(["hello", "there"])
    assert replies == plain(["hello", "there"], n=2, seeds=reply_seeds(5, 4))
    assert list(sampler.stream("hello")) == list(plain.stream("hello", seed=5, hold_back=9))
    assert len({reply.text for reply in replies}) == 4


def test_a_recipe_and_python_have_the_same_sampling_settings(smollm_shaped, reset_tokenizer):
    config = base.get_config()
    config.sample.update({"temperature": 0.5, "stop_strings": ("a", "b"), "reset_bias": -2.0})
    params = SamplingParams(temperature=0.5, stop_strings=["a", "b"], reset_bias=-2)
    sampler = recipe_sampler(config, smollm_shaped, reset_tokenizer)
    assert sampler.params == params and sampler.params.decisive() == params.decisive()


def test_a_mode_that_the_model_was_not_trained_for_is_refused(smollm_shaped, reset_tokenizer):
    trained = type(reset_tokenizer)(reset_tokenizer.hf, reset_mode="rewind")
    with pytest.raises(InputError, match="trained with 'rewind'"):
        Sampler(smollm_shaped, trained, reset_mode="keep")
    Sampler(smollm_shaped, trained, SamplingParams(temperature=1.0), reset_mode="resample")


def test_stop_strings_end_a_reply_before_them(smollm_shaped, reset_tokenizer):
    settings = dict(max_new_tokens=12, max_resets=0, max_num_seqs=2)
    whole = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(**settings))(["hello", "there"])
    ends = [reply.text[len(reply.text) // 2 :][:3] for reply in whole]
    assert all(ends)
    stopped = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(stop_strings=ends, **settings))(["hello", "there"])
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text[: min(place for place in map(before.text.find, ends) if place >= 0)]
        assert after.finish_reason == "stop"


def test_other_resets_are_those_of_a_sampler_made_with_them(smollm_shaped, reset_tokenizer):
    settings = dict(max_new_tokens=5, max_num_seqs=2)
    sampler = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(max_resets=1, reset_bias=1e9, **settings))
    masked, twice = sampler.with_resets(max_resets=0), sampler.with_resets(reset_bias=1e9, max_resets=2)
    assert masked(["hello"]) == Sampler(smollm_shaped, reset_tokenizer, SamplingParams(max_resets=0, **settings))(
        ["hello"]
    )
    assert [each(["hello"])[0].resets for each in (sampler, masked, twice)] == [1, 0, 2]
    for wrong in (dict(max_resets=-1), dict(reset_bias=float("nan"))):
        with pytest.raises(InputError, match=next(iter(wrong))):
            sampler.with_resets(**wrong)


def test_a_trace_has_every_token_written(smollm_shaped, reset_tokenizer):
    settings = dict(max_resets=1, reset_bias=[-1e9, -1e9, 1e9], max_new_tokens=5, max_num_seqs=2)
    (reply,) = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(logprobs=True, **settings))(["hello"])
    trace = reply.trace
    assert len(trace.token_ids) == len(trace.logprobs) == len(trace.reset_logprobs) == reply.num_tokens == 3 + 5
    assert trace.token_ids[2] == reset_tokenizer.reset_id and trace.logprobs[2] == trace.reset_logprobs[2]
    assert reply.drafts == (reset_tokenizer.decode(trace.token_ids[:2]),)
    assert reply.text == reset_tokenizer.decode(trace.token_ids[3:])
    assert Sampler(smollm_shaped, reset_tokenizer, SamplingParams(**settings))(["hello"])[0].trace is None


def test_a_stream_ends_in_the_reply_that_the_sampler_gives(smollm_shaped, reset_tokenizer):
    sampler = Sampler(
        smollm_shaped, reset_tokenizer, SamplingParams(max_new_tokens=12, reset_bias=[-1e9] * 6 + [1e9], max_num_seqs=2)
    )
    (reply,) = sampler(["hello"], prefills=["Well, I"], seeds=[3])
    for hold_back in (0, 2, 20):
        events = list(sampler.stream("hello", prefill="Well, I", seed=3, hold_back=hold_back))
        *events, done = events
        assert done == Finished(reply)
        shown, withdrawn = "", []
        for event in events:
            if isinstance(event, Retraction):
                assert event.shown == shown
                withdrawn.append(shown)
            shown = "" if isinstance(event, Retraction) else shown + event.text
        assert shown == reply.text and len(withdrawn) == 1 and reply.drafts[0].startswith(withdrawn[0])
        assert (withdrawn == [""]) == (hold_back == 20)


@pytest.mark.parametrize("hold_back", [0, 3])
def test_a_stream_says_of_each_token_how_likely_a_reset_was(smollm_shaped, reset_tokenizer, hold_back):
    """The pieces of the reply are its tokens in their order, each with the trace's number for it."""
    settings = dict(max_new_tokens=12, reset_bias=[-1e9] * 10 + [1e9], max_num_seqs=2)
    sampler = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(logprobs=True, **settings))
    *events, done = sampler.stream("hello", prefill="Well: ", seed=3, hold_back=hold_back)
    trace, pieces = done.reply.trace, [[]]
    for event in events:
        match event:
            case Retraction(shown, chance):
                place = trace.token_ids.index(reset_tokenizer.reset_id)
                assert chance == trace.reset_logprobs[place] and shown == "".join(piece.text for piece in pieces[-1])
                pieces.append([])
            case TextDelta(text, more):
                assert text == "".join(piece.text for piece in more) and all(piece.text for piece in more)
                pieces[-1] += more
    draft, reply = pieces
    assert "".join(piece.text for piece in reply) == done.reply.text
    of_draft, of_reply = trace.reset_logprobs[:place], trace.reset_logprobs[place + 1 :]
    given = [piece.text for piece in draft if piece.reset_logprob is None]
    assert "".join(given) == "Well: " and len(draft) > len(given)
    for shown, its in (draft[len(given) :], of_draft), (reply, of_reply):
        chances = [piece.reset_logprob for piece in shown]
        assert set(chances) <= set(its) and chances == sorted(chances, key=its.index)
    ids = trace.token_ids[place + 1 :]
    ends = [len(reset_tokenizer.decode(ids[:count]).rstrip("\ufffd")) for count in range(len(ids) + 1)]
    at = 0
    for piece in reply:
        at += len(piece.text)
        token = next(count for count, end in enumerate(ends) if end >= at or count == len(ids)) - 1
        assert piece.reset_logprob == of_reply[token]
    first, *_ = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(**settings)).stream(
        "hello", prefill="Well: ", seed=3
    )
    assert first.pieces and all(piece.reset_logprob is None for piece in first.pieces)


def test_a_stream_shows_nothing_that_a_stop_string_takes_away(smollm_shaped, reset_tokenizer):
    """Stop strings of several tokens, cut from a reply so that they begin and end with characters of any kind."""
    settings = dict(max_new_tokens=12, max_resets=0, max_num_seqs=2)
    text = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(**settings))(["hello"])[0].text
    for start in range(2, len(text) - 6, 5):
        stop = text[start : start + 6]
        sampler = Sampler(smollm_shaped, reset_tokenizer, SamplingParams(stop_strings=[stop], **settings))
        *tokens, done = sampler.stream("hello")
        assert "".join(token.text for token in tokens) == done.reply.text == text[: text.find(stop)]
    writing = Writing(reset_tokenizer, stop_strings=["\nUser:", "User says"])
    assert [writing.may_stop_at(text) for text in ("a\nUser", "a User", "User is", "")] == [1, 2, 7, 0]


def test_words_and_characters_come_out_whole(reset_tokenizer):
    """Tokens one by one: "\U0001f9a9" takes several of them, and a word of a script with spaces often does."""
    text = "Unbelievable! \u65e5\u672c\u8a9e \U0001f9a9 r\u00e9sum\u00e9s, done"
    writing, shown = Writing(reset_tokenizer), []
    for token in reset_tokenizer.encode(text):
        writing.take(np.asarray([token]), is_last=False)
        shown.append(_whole(writing.text()))
    assert all(text.startswith(each) for each in shown)
    starts = [
        place for place in range(len(text)) if place == 0 or not (text[place].isalpha() and text[place - 1].isalpha())
    ]
    assert {len(each) for each in shown} <= {0, *starts, *range(14, 18)}
    assert "\U0001f9a9" in shown[-1] and len(set(shown)) > 5
    assert _whole("a line\n") == "a line\n", "its last word is whole"


MULTIBYTE = "as \u00e9, 1\u00e9 \u2603s \U0001f600! e\u0301 \u65e5\u672c \u0e01\u0e33"


@pytest.mark.parametrize("hold_back", [0, 1, 3])
def test_what_is_shown_is_never_taken_back_by_a_stop_string(hold_back):
    """Every token is a byte, so that characters and stop strings of every length are cut at every place."""
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(MULTIBYTE)
    assert len(ids) == len(MULTIBYTE.encode())
    stops = {MULTIBYTE[start : start + length] for start in range(len(MULTIBYTE)) for length in (1, 2, 3, 5)}
    for stop in stops:
        writing, shown = Writing(tokenizer, stop_strings=[stop]), [""]
        for place, token in enumerate(ids):
            writing.take(np.array([token]), place == len(ids) - 1)
            if writing.finish_reason:
                break
            shown.append(_certain(writing, hold_back))
        reply = writing.reply()
        assert reply.text == MULTIBYTE[: MULTIBYTE.find(stop)] and reply.finish_reason == "stop"
        assert all(reply.text.startswith(text) for text in shown), stop


@pytest.fixture(scope="module")
def tiny_pair():
    """A tiny model with [RESET], and a tokenizer of single bytes."""
    tokenizer = small_tokenizer()
    model = tiny.model(seed=3, vocab_size=len(tokenizer.hf))
    return model, add_reset(model, tokenizer)


@pytest.mark.parametrize("samples", [1, 3])
def test_more_prompts_than_fit_with_several_samples_each_equal_each_alone(tiny_pair, samples):
    asked = [f"q{number} " + "x" * (7 * number % 50) for number in range(33)]
    sampler = Sampler(*tiny_pair, SamplingParams(temperature=1.2, max_new_tokens=6, max_num_seqs=16, reset_bias=1.0))
    together = sampler(asked, n=samples)
    assert len(together) == 33 * samples and any(reply.drafts for reply in together)
    for number in (0, 15, 16, 32):
        of_prompt = slice(number * samples, (number + 1) * samples)
        seeds = reply_seeds(0, len(together))[of_prompt]
        assert sampler([asked[number]], n=samples, seeds=seeds) == together[of_prompt]


@every_mode
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_a_prompt_that_ends_where_the_positions_do(tiny_pair, mode, new_tokens):
    """Prompt and reply fill the positions; drafts and resets need none more."""
    model, tokenizer = tiny_pair
    limit = model.config.max_position_embeddings
    prompt = np.random.default_rng(1).integers(0, 250, limit - new_tokens, dtype=np.int32)
    settings = dict(max_new_tokens=new_tokens, temperature=1.0, reset_bias=3.0, max_resets=2, logprobs=True)
    sampler = Sampler(model, tokenizer, SamplingParams(**settings), reset_mode=mode)
    split = nnx.split(model)

    def last_logits(ids):
        padded = np.zeros((1, limit + 2), np.int32)
        padded[0, : len(ids)] = ids
        return np.array(causal_logits(*split, padded)[len(ids) - 1])

    for number, (seed, reply) in enumerate(zip(reply_seeds(0, 3), sampler([prompt], n=3), strict=True)):
        request = Request(number, prompt, np.zeros(0, np.int32), seed=seed)
        plan, turned = sampler._engine.static, sampler._engine.traced
        assert list(reply.trace.token_ids) == naive(last_logits, request, 0, plan, turned, new_tokens)
    with pytest.raises(InputError, match="exceed the model's 256 positions"):
        sampler([np.append(prompt, 5)])
