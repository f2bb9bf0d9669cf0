"""Usefulness without a judge: how likely a model finds replies that people preferred and that it never trained on."""

import functools

import jax
from flax import nnx
from ml_collections import ConfigDict

from jax_backtrack.data import examples, held_out, sources
from jax_backtrack.data.rows import TreeSource
from jax_backtrack.data.share import Share
from jax_backtrack.hub.tokenizer import ChatTokenizer
from jax_backtrack.models.scores import token_scores
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.progress import console, progress_bar
from jax_backtrack.safety.measures import Measure, perplexity
from jax_backtrack.sharding import on_host, rows_sharding
from jax_backtrack.trees import Recipe, Rows, pack, stack


def held_out_perplexity(config: ConfigDict, model: Transformer, tokenizer: ChatTokenizer) -> dict[str, Measure]:
    """Perplexity of the preferred replies to the held-out prompts of the recipe: "safety" of `data.path`, "utility" of
    `data.utility_path`. Nothing where `data.held_out` is 0. Replies are cut as in training (`data.reply_tokens`)."""
    found = {}
    for kind, path in (("safety", config.data.path), ("utility", config.data.utility_path)):
        if not (path and config.data.held_out):
            continue
        preferences, report = sources.read(
            path,
            utility=kind == "utility",
            split=config.data.split,
            format=config.data.format or None,
            limit=config.data.limit or None,
        )
        kept = [each for each in preferences if held_out.is_held_out(each.prompt, config.data.held_out)]
        if not kept:
            continue
        # The plain reply to the plain prompt.
        recipe = Recipe(objective="sft", backtrack=False, context="keep", reset_id=None, eot_id=tokenizer.eot_id)
        length = config.train.row_length
        report.dropped.clear()  # of the file as a whole; what follows is of the held-out part
        encoded = examples.encode(kept, tokenizer, recipe, length, report, config.data.reply_tokens)
        for line in report.lines():
            console.print(f"{path}, held out: {line}", highlight=False, markup=False)
        found[kind] = perplexity(*_scored(model, TreeSource(encoded, recipe, 0), config, kind))
    return found


def _scored(model: Transformer, source: TreeSource, config: ConfigDict, kind: str) -> tuple[list[float], list[int]]:
    """Of every example's reply the sum of log-probabilities, and the number of tokens."""
    graph, params = nnx.split(model)
    rows, length = config.train.batch_rows // config.train.accumulate, config.train.row_length
    share = Share(rows_sharding(model.compute.mesh), rows) if model.compute.mesh else None
    packed = [row.members for row in source.plan_rows(0, range(len(source.examples)), length)]
    sums, counts = [], []
    with progress_bar(f"perplexity, {kind}", len(source.examples)) as advance:
        for start in range(0, len(packed), rows):
            members = packed[start : start + rows]
            batch = stack(
                [pack([source.tree(0, index) for index in row], length) for row in members]
                + [pack([], length)] * (rows - len(members))
            )
            scores_BxS = on_host(_scores(graph, params, share.put(batch) if share else batch, config.train.score_chunk))
            for number, row in enumerate(members):
                for pair in range(len(row)):
                    is_scored_S = (batch.pair[number] == pair) & (batch.weight[number] != 0)
                    sums.append(float(scores_BxS[number][is_scored_S].sum()))
                    counts.append(int(is_scored_S.sum()))
            advance(sum(map(len, members)))
    return sums, counts


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _scores(graph, params, rows: Rows, chunk: int) -> jax.Array:
    return token_scores(nnx.merge(graph, params), rows, chunk)
