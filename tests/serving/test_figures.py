"""Pictures show the arrays that they are given: every token once, in the colour of what it is."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from jax_backtrack.backtracking import trees
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.cache_trace import NOTHING, CacheStep
from jax_backtrack.sampling.replies import Trace
from jax_backtrack.serving import figures

PROMPT = "Price: $5 or $6"


@pytest.fixture(scope="module")
def row(reset_tokenizer) -> trees.TokenTrees:
    ids = reset_tokenizer.encode
    example = trees.Example(ids(PROMPT), ids("No way."), ids("Yes it is."), backtracks=True)
    recipe = trees.TreeSpec("dpo", True, "rewind", reset_tokenizer.reset_id)
    return trees.build_tree(example, recipe, trees.Cuts(draft=2, guard=1))


def texts(figure) -> list:
    (axes,) = figure.axes
    figure.canvas.draw()
    return axes.texts


def test_a_tree_has_every_token_once_on_a_line_per_branch(row, reset_tokenizer):
    drawn = texts(figures.tree(trees.pack([row], row.length + 9), reset_tokenizer))
    spelt = [reset_tokenizer.hf.decode([token]).strip() or "␣" for token in row.tokens]
    assert [text.get_text() for text in drawn] == spelt and "$" in spelt
    assert [text.get_position()[0] for text in drawn] == row.position.tolist()
    leaves = [index for index in range(row.length) if row.subtree_end[index] == index + 1]
    assert len({text.get_position()[1] for text in drawn}) == len(leaves)
    colours = [to_hex(text.get_bbox_patch().get_facecolor()) for text in drawn]
    assert len(set(colours)) == len(set(np.sign(row.loss_weights))) == 3
    assert all(
        len({colour for colour, w in zip(colours, row.loss_weights, strict=True) if w == sign}) == 1
        for sign in (-1, 0, 1)
    )


def test_a_beginning_is_left_out(row, reset_tokenizer):
    assert len(texts(figures.tree(row, reset_tokenizer, start=3))) == row.length - 3
    for wrong in (-1, row.length):
        with pytest.raises(InputError, match=f"start is {wrong}"):
            figures.tree(row, reset_tokenizer, start=wrong)


def test_a_mask_is_the_rule_of_attention(row, reset_tokenizer):
    packed = trees.pack([row, row], 2 * row.length)  # whose prompts stand once, so there is padding
    used = 2 * row.length - len(reset_tokenizer.encode(PROMPT))
    for window in (None, 3):
        (axes,) = figures.mask(packed, reset_tokenizer, start=2, window=window).axes
        is_white = (np.asarray(axes.images[0].get_array()) == 1).all(-1)
        rule = np.asarray(trees.tree_attention_mask(packed.position[None], packed.subtree_end[None], window))[0]
        assert (~is_white == rule[2:used, 2:used]).all()


def steps(tokenizer) -> list[CacheStep]:
    """A row of a prompt of two and a reply of two slots that feeds "a", then [RESET]; it has ended in the last step."""
    ids = [int(tokenizer.encode(text)[0]) for text in ("x", "y", "a")] + [tokenizer.reset_id]
    holds = [[ids[0], ids[1], NOTHING, ids[2], NOTHING], [ids[0], ids[1], NOTHING, ids[2], ids[3]]]
    sees = [[1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    made = [
        CacheStep(np.array([fed]), slot, np.array([see], bool), np.array([hold]), 3, np.array([0]), np.array([False]))
        for fed, slot, see, hold in zip(ids[2:], (3, 4), sees, holds, strict=True)
    ]
    return [*made, CacheStep(made[1].fed, 3, made[1].sees, made[1].holds, 3, np.array([1]), np.array([True]))]


def test_a_cache_shows_what_is_seen_and_what_is_not_any_more(reset_tokenizer):
    figure = figures.cache(steps(reset_tokenizer), reset_tokenizer)
    assert [text.get_text() for text in texts(figure)] == ["x", "y", "a", "x", "y", "a", "[RESET]"]
    (axes,) = figure.axes
    colours = [[to_hex(cell) for cell in line] for line in np.asarray(axes.images[0].get_array())]
    seen, written, empty, unseen = colours[0][0], colours[0][2], colours[0][3], colours[1][2]
    assert colours == [[seen, seen, written, empty], [seen, seen, unseen, written]]
    assert len({seen, written, empty, unseen}) == 4
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "3", "4"]  # slot 2 was never written
    with pytest.raises(InputError, match="row 0 has no steps"):
        figures.cache(steps(reset_tokenizer)[2:], reset_tokenizer)


def test_chances_are_those_of_the_trace(reset_tokenizer):
    ids = (int(reset_tokenizer.encode("a")[0]), reset_tokenizer.reset_id, int(reset_tokenizer.encode("b")[0]))
    (axes,) = figures.reset_chances(Trace(ids, (0.0,) * 3, (-3.0, -0.1, -9.0)), reset_tokenizer).axes
    assert np.allclose([bar.get_height() for bar in axes.patches], np.exp([-3.0, -0.1, -9.0]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "[RESET]", "b"]
    assert len({to_hex(bar.get_facecolor()) for bar in axes.patches}) == 3
    with pytest.raises(InputError, match=r"without \[RESET\]"):
        figures.reset_chances(Trace(ids, (0.0,) * 3, None), reset_tokenizer)
