"""From preferences to batches of rows: nothing is lost, doubled or cut off, and all of it can be resumed."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_backtrack.backtracking.trees import (
    NO_PAIR,
    NO_PARENT,
    RESET_MODES,
    Branch,
    Cuts,
    Example,
    TreeSpec,
    check,
    flatten,
    pack,
    tree_length,
)
from jax_backtrack.data.examples import content_hash, encode
from jax_backtrack.data.preferences import BadRow, Preference, Report
from jax_backtrack.data.rows import PackedRows, TreeSource, batches, best_fit_pack
from jax_backtrack.errors import InputError
from jax_backtrack.training.reference import reference_hash
from tests import tiny

RECIPES = [
    TreeSpec(objective, backtrack, context, tiny.RESET_ID)
    for objective in ("sft", "dpo")
    for backtrack, context in [(False, "rewind"), *((True, context) for context in RESET_MODES)]
]
every_recipe = pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: f"{recipe.objective} {recipe.reset_mode if recipe.backtrack else 'baseline'}"
)
SFT, DPO = (TreeSpec(objective, True, "rewind", tiny.RESET_ID) for objective in ("sft", "dpo"))


def preference(chosen="In France.", rejected="No idea.", question="Where is Paris?", backtracks=True) -> Preference:
    return Preference(({"role": "user", "content": question},), chosen, rejected, backtracks, origin=question)


def of(recipe: TreeSpec, tokenizer) -> TreeSpec:
    return dataclasses.replace(recipe, reset_id=tokenizer.reset_id)


# ----------------------------------------------------------------------------------------------------- encode


def test_encoding_keeps_order_and_text(reset_tokenizer):
    preferences = [preference(question="a"), preference(question="b", rejected=None, backtracks=False)]
    report = Report()
    first, second = encode(preferences, reset_tokenizer, of(SFT, reset_tokenizer), 256, report)
    assert first.prompt.tolist() == reset_tokenizer.render(preferences[0].prompt).tolist()
    assert reset_tokenizer.decode(first.chosen) == "In France." and first.chosen[-1] == reset_tokenizer.eot_id
    assert reset_tokenizer.decode(first.rejected) == "No idea."
    assert (first.backtracks, second.backtracks, second.rejected) == (True, False, None)
    assert (report.used, report.dropped.total()) == (2, 0)


@every_recipe
def test_over_long_examples_are_dropped_and_counted(reset_tokenizer, recipe):
    recipe = of(recipe, reset_tokenizer)
    preferences = [preference(chosen="word " * count, question=str(count)) for count in range(5, 90)]
    report = Report()
    kept = encode(preferences, reset_tokenizer, recipe, 96, report)
    assert 0 < len(kept) < len(preferences)
    assert report.used == len(kept)
    (reason,) = report.dropped
    assert reason == "over-long: the tree has more than train.max_seq_len = 96 tokens"
    assert report.dropped[reason] == len(preferences) - len(kept)
    assert report.first[reason] == str(5 + len(kept))
    longest = [tree_length(each, recipe, Cuts(len(each.rejected) - 1, len(each.chosen) - 1)) for each in kept]
    assert 96 - 6 < max(longest) <= 96


@pytest.mark.parametrize(
    ("recipe", "bad", "reason"),
    [
        (DPO, preference(rejected=None, backtracks=False), "no rejected reply for a preference pair"),
        (SFT, preference("No idea. Sorry."), "the rejected reply is a prefix of the chosen one"),
    ],
)
def test_what_cannot_be_used_is_counted_under_its_reason(reset_tokenizer, recipe, bad, reason):
    report = Report()
    assert len(encode([preference(), bad], reset_tokenizer, of(recipe, reset_tokenizer), 256, report)) == 1
    assert report.used == 1
    assert report.dropped == {reason: 1}


@pytest.mark.parametrize("texts", [dict(chosen="\ud83d"), dict(rejected="\ud83d"), dict(question="\ud83d")])
def test_a_preference_of_half_a_surrogate_pair_is_none(texts):
    """So that nothing behind it, such as the hash by which prompts are held out, meets a text that has no bytes."""
    with pytest.raises(BadRow, match="not valid Unicode"):
        preference(**texts)


def test_no_example_left_is_an_error(reset_tokenizer):
    with pytest.raises(InputError, match=r"no example is left to train on: .*over-long"):
        encode([preference()], reset_tokenizer, of(SFT, reset_tokenizer), 8, Report())


@every_recipe
@pytest.mark.parametrize("backtracks", [True, False])
def test_all_that_is_kept_can_be_packed(reset_tokenizer, recipe, backtracks):
    """Also where one reply begins as the other does, and with utility data."""
    recipe = of(recipe, reset_tokenizer)
    replies = ["No", "No idea.", "No idea. Sorry.", "Paris"]
    preferences = [
        preference(chosen, rejected, backtracks=backtracks) for chosen, rejected in itertools.permutations(replies, 2)
    ]
    examples = encode(preferences, reset_tokenizer, recipe, 128, Report())
    rows = PackedRows(TreeSource(examples, recipe, seed=0), 128, 6)
    assert all(rows[number]["rows"].tokens.shape == (128,) for number in range(6))


@every_recipe
def test_of_a_cut_reply_nothing_but_its_beginning_is_seen(reset_tokenizer, recipe):
    """As if the reply ended there, without an end of turn."""
    recipe, report = of(recipe, reset_tokenizer), Report()
    cut = preference("Paris is in the north of France.", "Why would I tell you that?")
    (example,) = encode([cut, preference()][:1], reset_tokenizer, recipe, 256, report, max_response_length=4)
    ids = {name: reset_tokenizer.encode(getattr(cut, name)) for name in ("chosen", "rejected")}
    assert report.cut == 2 and "2 replies cut to data.max_response_length" in report.lines()
    assert example.chosen.tolist() == ids["chosen"][:4].tolist()
    assert example.rejected.tolist() == ids["rejected"][:4].tolist()
    tree = TreeSource([example], recipe, seed=0).tree(0, 0)
    assert reset_tokenizer.eot_id not in tree.tokens[len(example.prompt) :]
    assert set(tree.tokens[len(example.prompt) :]) <= {*ids["chosen"][:4], *ids["rejected"][:4], recipe.reset_id}
    (whole,) = encode([cut], reset_tokenizer, recipe, 256, Report(), max_response_length=len(ids["chosen"]) + 1)
    assert whole.chosen.tolist() == [*ids["chosen"].tolist(), reset_tokenizer.eot_id]


@pytest.mark.parametrize("max_response_length", [0, 4, 100])
def test_no_end_of_turn_follows_a_reply_that_was_cut_off_in_the_data(reset_tokenizer, max_response_length):
    recipe, report = of(SFT, reset_tokenizer), Report()
    begun = dataclasses.replace(preference("Paris is in the north of"), rejected=None, backtracks=False, whole=False)
    (example,) = encode([begun], reset_tokenizer, recipe, 256, report, max_response_length)
    ids = reset_tokenizer.encode(begun.chosen).tolist()
    assert example.chosen.tolist() == (ids[:4] if max_response_length == 4 else ids)
    assert report.lines() == ["1 rows used, 0 dropped", "1 replies end without an end of turn"]


@every_recipe
def test_a_reply_that_was_cut_off_after_a_token_is_trained_on(reset_tokenizer, recipe):
    """It has no prefix to cut it at: in SFT there is none to cut, and a guard pair of it takes back nothing."""
    recipe, report = of(recipe, reset_tokenizer), Report()
    rejected = None if recipe.objective == "sft" else "No idea."
    one = dataclasses.replace(preference("Paris"), rejected=rejected, backtracks=False, whole=False)
    assert len(reset_tokenizer.encode(one.chosen)) == 1
    (example,) = encode([one], reset_tokenizer, recipe, 64, report)
    source = TreeSource([example], recipe, seed=0)
    tree = source.tree(0, 0)
    check(tree)
    assert source.length(0, 0) == tree.length
    said = np.flatnonzero((tree.loss_weights > 0) & (tree.tokens == example.chosen[0]))
    assert len(said) == recipe.pairs and set(tree.pair_id[said].tolist()) == {*range(recipe.pairs)}
    assert (tree.parent[said] == len(example.prompt) - 1).all()
    assert report.lines() == ["1 rows used, 0 dropped", "1 replies end without an end of turn"]


# ----------------------------------------------------------------------------------------------- content hash


@given(tiny.examples(), st.sampled_from(["prompt", "chosen", "rejected"]), st.data())
def test_the_hash_changes_with_any_id(example, field, data):
    ids = getattr(example, field).copy()
    ids[data.draw(st.integers(0, len(ids) - 1))] += 1
    assert content_hash([example]) != content_hash([dataclasses.replace(example, **{field: ids})])


def test_the_hash_sees_borders_flags_and_order():
    def example(prompt, chosen, rejected, backtracks=False):
        arrays = (None if ids is None else np.asarray(ids, np.int32) for ids in (prompt, chosen, rejected))
        return Example(*arrays, backtracks)

    one, other = example([1, 2], [3], [4]), example([1], [2, 3], [4])
    lists = [
        [one],
        [other],
        [example([1, 2], [3, 4], [])],
        [example([1, 2], [3], None)],
        [example([1, 2], [3], [4], True)],
        [one, other],
        [other, one],
        [one, one],
    ]
    assert len({content_hash(each) for each in lists}) == len(lists)
    assert content_hash([example([1, 2], [3], [4])]) == content_hash([one])


# ---------------------------------------------------------------------------------------------------- packing


@given(st.integers(1, 40), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_planned_rows_fit_and_hold_everything_once(max_seq_len, count, seed):
    lengths = np.random.default_rng(seed).integers(1, max_seq_len + 1, count).tolist()
    rows = list(best_fit_pack([np.zeros(0, np.int32)] * count, lengths, max_seq_len))
    assert all(row.tokens == sum(lengths[index] for index in row.members) <= max_seq_len for row in rows)
    assert sorted(index for row in rows for index in row.members) == list(range(len(lengths)))
    # A row is opened only where no open one has room, so two neighbours are never both half empty.
    assert all(first.tokens + second.tokens > max_seq_len for first, second in itertools.pairwise(rows))


def test_a_tree_goes_where_it_leaves_the_least_room():
    nothing = np.zeros(0, np.int32)
    rows = list(best_fit_pack([nothing] * 5, [5, 7, 8, 3, 2], 10))
    assert [row.members for row in rows] == [[0], [1, 3], [2, 4]]


@given(st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_planned_rows_are_as_long_as_the_rows_that_are_packed(count, seed):
    """Prompts of two ids share many beginnings."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(count):
        prompt = rng.integers(5, 7, rng.integers(1, 6)).tolist()
        reply = Branch(rng.integers(5, 7, rng.integers(1, 4)).tolist(), pair_id=0, loss_weight=1.0)
        trees.append(flatten(Branch(prompt, children=(reply, reply))))
    prompts = [tree.tokens[tree.pair_id == NO_PAIR] for tree in trees]
    for row in best_fit_pack(prompts, [tree.length for tree in trees], 24):
        packed_row = pack([trees[index] for index in row.members], 24)
        check(packed_row)
        assert row.tokens == np.sum(packed_row.tokens != 0)


def test_what_two_prompts_share_is_planned_once():
    prompts = [np.asarray(ids) for ids in ([5, 6, 7, 8], [9], [5, 6, 7, 9])]
    (row,) = best_fit_pack(prompts, [6, 3, 6], 12)
    assert row.members == [0, 2, 1] and row.tokens == 12


def numbered_examples(count: int = 12) -> list[Example]:
    """Examples with replies of many lengths, whose first prompt token tells their number."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(5, tiny.VOCAB, length).astype(np.int32)

    made = []
    for number in range(count):
        prompt = np.concatenate([[100 + number], ids(number % 3)]).astype(np.int32)
        chosen, rejected = ids(4 + number), np.concatenate([[1], ids(15 - number)]).astype(np.int32)
        chosen, rejected = (np.append(reply, np.int32(tiny.EOT_ID)) for reply in (chosen, rejected))
        made.append(Example(prompt, chosen, rejected, backtracks=number % 2 == 0))
    return made


EXAMPLES = numbered_examples()
MAX_SEQ_LEN = 128


def packed(recipe: TreeSpec, count: int, seed: int = 0, reference=None) -> PackedRows:
    rows = PackedRows(TreeSource(EXAMPLES, recipe, seed), MAX_SEQ_LEN, count)
    rows.reference = reference
    return rows


def equal(one: dict, other: dict) -> bool:
    arrays = [[*vars(row["rows"]).values(), row["reference"]] for row in (one, other)]
    return all(np.array_equal(first, second) for first, second in zip(*arrays, strict=True))


@every_recipe
def test_every_example_comes_once_per_epoch_in_a_new_order(recipe):
    # Short rows: within one the trees stand in the order of their prompts, so few rows would have few orders.
    rows = PackedRows(TreeSource(EXAMPLES, recipe, seed=0), 64, 60)
    assert len(rows) == 60
    served = [index for number in range(60) for index in rows.members(number)]
    size = len(EXAMPLES)
    epochs = [tuple(served[start : start + size]) for start in range(0, len(served), size)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
    assert max(collections.Counter(epochs[-1]).values()) == 1
    assert len(set(epochs)) == len(epochs)


@every_recipe
def test_rows_hold_the_trees_of_their_members(recipe):
    rows = packed(recipe, count=20)
    for number in range(20):
        row = rows[number]["rows"]
        starts = np.flatnonzero((row.parent == NO_PARENT) & (row.tokens != 0))
        assert (row.tokens[starts] - 100).tolist() == rows.members(number)


@every_recipe
def test_rows_are_the_same_every_time_and_others_with_another_seed(recipe):
    one, again, other = packed(recipe, 8), packed(recipe, 8), packed(recipe, 8, seed=1)
    assert all(equal(one[number], again[number]) for number in (5, 2, 7))
    assert all(equal(one[number], one[number]) for number in (5, 2, 7))
    assert not all(equal(one[number], other[number]) for number in range(8))


@every_recipe
def test_cuts_are_new_in_every_epoch_of_sft_and_fixed_in_dpo(recipe):
    source = TreeSource(EXAMPLES, recipe, seed=0)
    changed = [source.cuts(0, index) != source.cuts(1, index) for index in range(len(EXAMPLES))]
    assert any(changed) == (recipe.objective == "sft")


@every_recipe
@given(st.integers(0, 5), st.integers(0, len(EXAMPLES) - 1))
def test_the_length_of_a_tree_is_known_before_it_is_built(recipe, epoch, index):
    source = TreeSource(EXAMPLES, recipe, seed=0)
    assert source.length(epoch, index) == source.tree(epoch, index).length


def test_the_reference_of_a_pair_stands_at_its_number():
    reference = np.random.default_rng(0).normal(size=(len(EXAMPLES), 2, 2)).astype(np.float32)
    rows = packed(DPO, 10, reference=reference)
    for number in range(10):
        row, reference_Sx2 = rows[number]["rows"], rows[number]["reference"]
        members = rows.members(number)
        assert reference_Sx2[: 2 * len(members)].tolist() == reference[members].reshape(-1, 2).tolist()
        assert not reference_Sx2[2 * len(members) :].any()
        assert set(row.pair_id.tolist()) == {NO_PAIR, *range(2 * len(members))}


def test_the_reference_of_another_configuration_is_another_one():
    """The same weights compute something else with another rope."""
    source, model = TreeSource(EXAMPLES, DPO, seed=0), tiny.model()
    before = reference_hash(model, source)
    model.config = dataclasses.replace(model.config, rope_theta=5e5)
    assert reference_hash(model, source) != before


# ---------------------------------------------------------------------------------------------------- batches


def test_batches_hold_the_rows_in_order():
    rows = packed(SFT, 12)
    served = list(batches(rows, 4))
    assert len(served) == 3
    for batch, first in zip(served, (0, 4, 8), strict=True):
        assert all(array.shape == (4, MAX_SEQ_LEN) for array in vars(batch["rows"]).values())
        assert batch["reference"].shape == (4, MAX_SEQ_LEN, 2)
        assert batch["rows"].tokens.dtype == np.int32 and batch["rows"].loss_weights.dtype == np.float32
        for row in range(4):
            assert np.array_equal(batch["rows"].tokens[row], rows[first + row]["rows"].tokens)


@settings(max_examples=5)
@given(st.integers(0, 6))
def test_a_resumed_iterator_goes_on_where_it_was(taken):
    whole = batches(packed(SFT, 12), 2)
    for _ in range(taken):
        next(whole)
    resumed = batches(packed(SFT, 12), 2)
    resumed.set_state(whole.get_state())
    rest, resumed_rest = list(whole), list(resumed)
    assert len(rest) == len(resumed_rest) == 6 - taken
    assert all(equal(one, other) for one, other in zip(rest, resumed_rest, strict=True))
