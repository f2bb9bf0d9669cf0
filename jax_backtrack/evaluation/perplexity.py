"""Usefulness without a judge: how likely a model finds replies that people preferred and that it never trained on."""

from ml_collections import ConfigDict

from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data import examples, held_out
from jax_backtrack.data.rows import TreeSource
from jax_backtrack.evaluation.stats import Estimate, perplexity
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.training.data import read_data
from jax_backtrack.training.reference import tree_logps
from jax_backtrack.utils.console import console, progress_bar


def held_out_perplexity(config: ConfigDict, model: Transformer, tokenizer: ChatTokenizer) -> dict[str, Estimate]:
    """Returns the perplexity of the preferred replies to the held-out prompts of the recipe: "safety" of `data.path`,
    "utility" of `data.utility_path`. Nothing where `data.held_out_fraction` is 0. Replies are cut as in training."""
    perplexities, train = {}, config.train
    # The plain reply to the plain prompt, of weight 1: the chosen side of a tree is the reply's log-probability.
    spec = TreeSpec(objective="sft", backtrack=False, reset_mode="keep", reset_id=None)
    for kind in ("safety", "utility") if config.data.held_out_fraction else ():
        encoded = []
        for path, preferences, report in read_data(config, utility=kind == "utility"):
            preferred = [
                preference
                for preference in preferences
                if held_out.is_held_out(preference.prompt, config.data.held_out_fraction)
            ]
            if not preferred:
                continue
            report.dropped.clear()  # of the file as a whole; what follows is of the held-out part
            encoded += examples.encode(
                preferred, tokenizer, spec, train.max_seq_len, report, config.data.max_response_length
            )
            for line in report.lines():
                console.print(f"{path}, held out: {line}", highlight=False, markup=False)
        if not encoded:
            continue
        with progress_bar(f"perplexity, {kind}", len(encoded)) as advance:
            logps_Nx1x2 = tree_logps(
                model,
                TreeSource(encoded, spec, 0),
                range(len(encoded)),
                max_seq_len=train.max_seq_len,
                batch_size=train.batch_size // train.grad_accumulation_steps,
                chunk=train.logits_chunk_size,
                progress=advance,
            )
        perplexities[kind] = perplexity(logps_Nx1x2[:, 0, 0], [len(example.chosen) for example in encoded])
    return perplexities
