"""A token tree says the same as its paths, one by one; and a broken tree is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jax_backtrack.backtracking import trees
from jax_backtrack.backtracking.trees import (
    Branch,
    Cuts,
    Example,
    TreeSpec,
    build_tree,
    check,
    draw_cuts,
    flatten,
    pack,
    tree_length,
)
from jax_backtrack.errors import InputError
from jax_backtrack.models.logprobs import token_logprobs
from tests import tiny

S = 96
MODELS = {family: nnx.split(tiny.model(**fields)) for family, fields in tiny.FAMILIES.items()}
every_family = pytest.mark.parametrize("family", MODELS)
few = settings(max_examples=15, deadline=None)


@functools.partial(jax.jit, static_argnums=0)
def logprobs_and_gradient(graph, params, rows, weight_BxS):
    def total(params):
        logprob_BxS = token_logprobs(nnx.merge(graph, params), rows, chunk=32)
        return jnp.sum(weight_BxS * logprob_BxS), logprob_BxS

    (_, logprob_BxS), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return logprob_BxS, gradient


@functools.partial(jax.jit, static_argnums=0)
def path_logprobs_and_gradient(graph, params, tokens_BxS, last_B, weight_B):
    """Log-probability of the token at `last` of each plain sequence, by the causal model and nothing of ours."""

    def total(params):
        log_p_BxSxV = jax.nn.log_softmax(nnx.merge(graph, params)(tokens_BxS))
        row = jnp.arange(len(last_B))
        logprob_B = log_p_BxSxV[row, last_B - 1, tokens_BxS[row, last_B]]
        return jnp.sum(weight_B * logprob_B), logprob_B

    (_, logprob_B), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return logprob_B, gradient


def path_to(row: trees.TokenTrees, index: int) -> list[int]:
    path = []
    while index != trees.NO_PARENT:
        path.append(int(row.tokens[index]))
        index = int(row.parent[index])
    return path[::-1]


def by_paths(row: trees.TokenTrees, family: str):
    """Scores and gradient of a row's scored tokens, each path run as a sequence of its own."""
    scored = np.flatnonzero(row.loss_weights)
    tokens = np.zeros((S, S), np.int32)
    last, weight = np.ones(S, np.int32), np.zeros(S, np.float32)
    for number, index in enumerate(scored):
        path = path_to(row, index)
        tokens[number, : len(path)] = path
        last[number], weight[number] = len(path) - 1, row.loss_weights[index]
    logprob, gradient = path_logprobs_and_gradient(*MODELS[family], tokens, last, weight)
    full = np.zeros(row.length, np.float32)
    full[scored] = np.asarray(logprob)[: len(scored)]
    return full, gradient


def by_tree(row: trees.TokenTrees, family: str):
    logprob, gradient = logprobs_and_gradient(*MODELS[family], trees.stack([row]), row.loss_weights[None])
    return np.asarray(logprob[0]), gradient


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * max(1.0, float(np.abs(b).max())))


@every_family
@few
@given(st.lists(tiny.rooted_trees(), min_size=1, max_size=3), st.randoms())
def test_scores_and_gradients_of_packed_trees_are_those_of_their_paths(family, branches, random):
    flat = [flatten(branch) for branch in branches]
    assume(sum(tree.length for tree in flat) <= S)
    random.shuffle(flat)
    row = pack(flat, S)
    for of_tree, of_paths in zip(by_tree(row, family), by_paths(row, family), strict=True):
        assert_same(of_tree, of_paths)


@every_family
@few
@given(
    tiny.examples(),
    st.sampled_from(["sft", "dpo"]),
    st.sampled_from(["keep", "rewind", "resample"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_training_trees_score_as_their_paths(family, example, objective, mode, backtrack, seed):
    recipe = TreeSpec(objective, backtrack, mode, tiny.RESET_ID)
    row = pack([build_tree(example, recipe, draw_cuts(example, np.random.default_rng(seed)))], S)
    for of_tree, of_paths in zip(by_tree(row, family), by_paths(row, family), strict=True):
        assert_same(of_tree, of_paths)


@every_family
@few
@given(tiny.rooted_trees(), st.randoms())
def test_the_order_of_branches_does_not_matter(family, branch, random):
    def shuffled(branch: Branch) -> Branch:
        children = [shuffled(child) for child in branch.children]
        random.shuffle(children)
        return dataclasses.replace(branch, children=tuple(children))

    one, other = flatten(branch), flatten(shuffled(branch))
    assume(one.length <= S)
    scored = [by_tree(pack([tree], S), family) for tree in (one, other)]
    assert_same(scored[0][1], scored[1][1])
    np.testing.assert_allclose(np.sort(scored[0][0]), np.sort(scored[1][0]), rtol=1e-4, atol=1e-4)


@every_family
@few
@given(st.lists(tiny.rooted_trees(), min_size=1, max_size=3), st.data())
def test_a_token_changes_the_scores_of_its_subtree_only(family, branches, data):
    flat = [flatten(branch) for branch in branches]
    assume(sum(tree.length for tree in flat) <= S)
    row = pack(flat, S)
    row = dataclasses.replace(
        row, loss_weights=(row.parent != trees.NO_PARENT).astype(np.float32), pair_id=np.zeros(S, np.int32)
    )
    index = data.draw(st.integers(0, sum(tree.length for tree in flat) - 1))
    tokens = row.tokens.copy()
    tokens[index] = 5 + (tokens[index] - 4) % (tiny.VOCAB - 5)
    changed = by_tree(row, family)[0] != by_tree(dataclasses.replace(row, tokens=tokens), family)[0]
    outside = np.ones(S, bool)
    outside[index : row.subtree_end[index]] = False
    assert not changed[outside].any()
    if row.subtree_end[index] > index + 1:
        assert changed[index + 1 : row.subtree_end[index]].any()


def paths_of(row: trees.TokenTrees) -> set:
    """Every scored run of tokens as (context, scored tokens, pair, sign)."""
    runs = set()
    for index in np.flatnonzero(row.loss_weights):
        above = row.parent[index]
        term = row.pair_id[index], row.loss_weights[index]
        if above >= 0 and row.loss_weights[above] and (row.pair_id[above], row.loss_weights[above]) == term:
            continue
        run, at = [], index
        while True:
            run.append(int(row.tokens[at]))
            children = [c for c in range(at + 1, row.length) if row.parent[c] == at and row.loss_weights[c]]
            if not children:
                break
            (at,) = children
        runs.add((tuple(path_to(row, above)), tuple(run), int(term[0]), float(term[1])))
    return runs


X, YES, NO, R, E = (7, 8), (10, 11, 12), (20, 21), tiny.RESET_ID, tiny.EOT_ID
example = Example(*(np.asarray(ids, np.int32) for ids in (X, (*YES, E), (*NO, E))), backtracks=True)
utility = dataclasses.replace(example, backtracks=False)
cuts = Cuts(draft=1, guard=2)


@pytest.mark.parametrize("mode", ["keep", "resample"])
def test_sft_tree_with_the_draft_kept(mode):
    recipe = TreeSpec("sft", True, mode, R)
    assert paths_of(build_tree(example, recipe, cuts)) == {
        ((*X,), (*YES, E), 0, 1.0),
        ((*X, 20), (R, *YES, E), 0, 1.0),
    }


def test_sft_tree_with_the_draft_rewound():
    assert paths_of(build_tree(example, TreeSpec("sft", True, "rewind", R), cuts)) == {
        ((*X,), (*YES, E), 0, 1.0),
        ((*X, 20), (R,), 0, 1.0),
        ((*X, R), (*YES, E), 0, 1.0),
    }


def test_dpo_tree_with_the_draft_kept():
    assert paths_of(build_tree(example, TreeSpec("dpo", True, "keep", R), cuts)) == {
        ((*X, 20), (R, *YES, E), 0, 1.0),
        ((*X, 20), (21, E), 0, -1.0),
        ((*X, 10, 11), (12, E), 1, 1.0),
        ((*X, 10, 11), (R, *NO, E), 1, -1.0),
    }


def test_dpo_tree_with_the_draft_rewound():
    assert paths_of(build_tree(example, TreeSpec("dpo", True, "rewind", R), cuts)) == {
        ((*X, 20), (R,), 0, 1.0),
        ((*X, R), (*YES, E), 0, 1.0),
        ((*X, 20), (21, E), 0, -1.0),
        ((*X, 10, 11), (12, E), 1, 1.0),
        ((*X, 10, 11), (R,), 1, -1.0),
        ((*X, R), (*NO, E), 1, -1.0),
    }


def test_dpo_tree_of_utility_data_has_a_plain_pair_and_a_guard_pair():
    assert paths_of(build_tree(utility, TreeSpec("dpo", True, "keep", R), cuts)) == {
        ((*X,), (*YES, E), 0, 1.0),
        ((*X,), (*NO, E), 0, -1.0),
        ((*X, 10, 11), (12, E), 1, 1.0),
        ((*X, 10, 11), (R, *NO, E), 1, -1.0),
    }


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_baseline_trees_have_no_resets(objective):
    runs = paths_of(build_tree(example, TreeSpec(objective, False, "rewind", None), cuts))
    plain = {((*X,), (*YES, E), 0, 1.0)}
    assert runs == (plain if objective == "sft" else plain | {((*X,), (*NO, E), 0, -1.0)})


@pytest.mark.parametrize("mode", trees.RESET_MODES)
def test_a_safe_reply_right_behind_the_prompt_has_a_weight_of_its_own(mode):
    of = {weight: TreeSpec("sft", True, mode, R, initial_reply_weight=weight) for weight in (0.0, 0.5, 1.0)}
    runs = {weight: paths_of(build_tree(example, recipe, cuts)) for weight, recipe in of.items()}
    (direct,) = runs[1.0] - runs[0.0]
    assert direct == ((*X,), (*YES, E), 0, 1.0) and runs[0.0] < runs[1.0]
    assert runs[0.5] == runs[0.0] | {(*direct[:3], 0.5)}
    assert paths_of(build_tree(utility, of[0.0], cuts)) == {direct}


def test_utility_data_has_no_draft_in_sft():
    for context in ("keep", "rewind"):
        assert paths_of(build_tree(utility, TreeSpec("sft", True, context, R), cuts)) == {((*X,), (*YES, E), 0, 1.0)}


@given(
    tiny.examples(), st.sampled_from(["sft", "dpo"]), st.sampled_from(trees.RESET_MODES), st.booleans(), st.integers()
)
def test_tree_length_is_the_length_of_the_tree(example, objective, mode, backtrack, seed):
    recipe = TreeSpec(objective, backtrack, mode, tiny.RESET_ID, initial_reply_weight=seed % 2)
    cuts = draw_cuts(example, np.random.default_rng(abs(seed)))
    assert tree_length(example, recipe, cuts) == build_tree(example, recipe, cuts).length


def test_cuts_are_uniform_and_a_draft_is_never_a_prefix_of_the_chosen_reply():
    chosen, rejected = np.asarray([9, 9, 1, E], np.int32), np.asarray([9, 9, 2, 4, 5, E], np.int32)
    drawn = [draw_cuts(Example(chosen, chosen, rejected, True), np.random.default_rng(seed)) for seed in range(3000)]
    drafts = np.bincount([cuts.draft for cuts in drawn], minlength=6)
    guards = np.bincount([cuts.guard for cuts in drawn], minlength=4)
    assert (drafts[:3] == 0).all() and guards[0] == 0
    assert (abs(drafts[3:] - 1000) < 120).all() and (abs(guards[1:] - 1000) < 120).all()


def test_a_rejected_reply_that_begins_the_chosen_one_has_no_draft():
    with pytest.raises(InputError, match="prefix of the chosen"):
        replies = (np.asarray(ids, np.int32) for ids in ([9, 8, 7, E], [9, 8, E]))
        draw_cuts(Example(np.ones(1, np.int32), *replies, True), np.random.default_rng(0))


@given(tiny.rooted_trees(), st.data())
def test_a_broken_tree_is_refused(branch, data):
    row = flatten(branch)
    index = data.draw(st.integers(0, row.length - 1))
    field = data.draw(st.sampled_from(["parent", "position", "subtree_end"]))
    value = data.draw(st.integers(-2, row.length + 1))
    assume(value != getattr(row, field)[index])
    broken = getattr(row, field).copy()
    broken[index] = value
    with pytest.raises(InputError, match="broken token tree"):
        check(dataclasses.replace(row, **{field: broken}))


def test_interleaved_trees_are_refused():
    with pytest.raises(InputError, match="depth-first"):
        check(
            trees.TokenTrees(
                tokens=np.zeros(4, np.int32),
                parent=np.asarray([-1, 0, -1, 0], np.int32),
                position=np.asarray([0, 1, 0, 1], np.int32),
                subtree_end=np.asarray([4, 2, 3, 4], np.int32),
                pair_id=np.full(4, -1, np.int32),
                loss_weights=np.zeros(4, np.float32),
            )
        )


def test_a_scored_root_is_refused():
    with pytest.raises(InputError, match="it is scored, but"):
        flatten(Branch([5, 6], pair_id=0, loss_weight=1.0))


def test_a_row_that_is_too_short_is_refused():
    tree = flatten(Branch([5], children=(Branch([6, 7, 8], pair_id=0, loss_weight=1.0),)))
    assert pack([tree, tree], 7).length == 7
    with pytest.raises(InputError, match="7 tokens do not fit into a row of 6"):
        pack([tree, tree], 6)


def test_packing_keeps_pairs_apart():
    tree = build_tree(example, TreeSpec("dpo", True, "keep", R), cuts)
    row = pack([tree, tree], S)
    assert set(row.pair_id[row.loss_weights != 0]) == {0, 1, 2, 3}
    check(row)


def scored_paths(row: trees.TokenTrees) -> list:
    return [(tuple(path_to(row, index)), row.loss_weights[index]) for index in np.flatnonzero(row.loss_weights)]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(5, 6), min_size=1, max_size=5), st.lists(tiny.branches(depth=2), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_prompts_that_begin_alike_stand_once_and_change_no_path(drawn):
    made = [flatten(Branch(prompt, children=tuple(children))) for prompt, children in drawn]
    row = pack(made, sum(tree.length for tree in made))
    check(row)
    assert scored_paths(row) == [path for tree in made for path in scored_paths(tree)]
    # Every tree of these has at most one pair, which stays its own.
    owners = [number for number, tree in enumerate(made) for _ in range(np.count_nonzero(tree.loss_weights))]
    owner_of = dict(zip(row.pair_id[row.loss_weights != 0].tolist(), owners, strict=True))
    assert [owner_of[pair] for pair in row.pair_id[row.loss_weights != 0].tolist()] == owners
    assert len(set(owner_of.values())) == len(owner_of)


def test_a_prompt_that_begins_two_others_carries_both():
    reply = (Branch([7, 8], pair_id=0, loss_weight=1.0),)
    row = pack([flatten(Branch(prompt, children=reply)) for prompt in ([5], [5, 6], [5, 6])], 9)
    assert row.tokens.tolist() == [5, 7, 8, 6, 7, 8, 7, 8, 0]
    assert row.parent.tolist() == [-1, 0, 1, 0, 3, 4, 3, 6, -1]
    assert row.subtree_end.tolist() == [8, 3, 3, 8, 6, 6, 8, 8, 9]
    assert row.position.tolist() == [0, 1, 2, 1, 2, 3, 2, 3, 0]
    assert row.pair_id.tolist() == [-1, 0, 0, -1, 1, 1, 2, 2, -1]
    check(row)


@functools.cache
def window_rule(window):
    position, end = jnp.asarray([[0, 1, 2, 2, 3]]), jnp.asarray([[5, 5, 3, 5, 5]])
    return np.asarray(trees.tree_attention_mask(position, end, window))[0].astype(int).tolist()


def test_the_rule_by_hand():
    """A prompt of two tokens, a branch of one and a branch of two, first without and then with a window of 2."""
    assert window_rule(None) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert window_rule(2) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("field,wrong,right", [("objective", "dop", "dpo"), ("reset_mode", "rewnd", "rewind")])
def test_a_misspelt_recipe_names_the_nearest(field, wrong, right):
    recipe = dict(objective="sft", backtrack=True, reset_mode="keep", reset_id=R)
    with pytest.raises(InputError, match=right):
        TreeSpec(**(recipe | {field: wrong}))
