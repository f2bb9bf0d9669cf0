"""Replies in a notebook, as they are written: below the cell, one model or several side by side."""

from collections.abc import Mapping

from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.serving.conversation import Turn, answers, worth_drawing
from jax_backtrack.serving.conversation_page import STYLE, conversation_html

# gradio's page gives the style sheet its colours and its height; a notebook has neither.
_HERE = """
.conversation { --background-fill-secondary: #8882; --border-color-primary: #8886; --body-text-color-subdued: #888; }
.conversation { max-height: none; font-family: system-ui, sans-serif; }
"""


def watch(
    samplers: Mapping[str, Sampler],
    message: str,
    *,
    system: str = "",
    prefill: str = "",
    seed: int = 0,
    hold_back: int = 0,
) -> Turn:
    """Asks every model, shows the answers below the cell as they grow, and gives the turn once all have ended.

    samplers:  by the name that stands over their answers; under those with `logprobs` bars show how likely [RESET] was
    system:    a system message; "" for none
    prefill:   how the replies begin, written for the models
    hold_back: tokens that stay unseen behind the newest one

    Drafts that were taken back are struck through. A model that cannot answer says why in its `Answer.error`.
    """
    from IPython.display import HTML, display  # a notebook has it, and nothing else needs it

    settings = dict(system=system, prefill=prefill, seed=seed, hold_back=hold_back)
    place = None
    for turn in worth_drawing(answers(list(samplers.values()), [], message, **settings)):
        page = HTML(f"<style>{STYLE.read_text()}{_HERE}</style>{conversation_html([turn], list(samplers))}")
        if place is None:
            place = display(page, display_id=True)
        else:
            place.update(page)
    return turn
