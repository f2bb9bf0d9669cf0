"""A conversation as HTML. Whatever a user or a model wrote is escaped: it can be read there, and does nothing."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jax_backtrack.sampling.streams import TokenText
from jax_backtrack.serving.conversation import Answer, Draft, Turn

STYLE = Path(__file__).with_name("conversation_page.css")
DECADES = 4  # of the probability of [RESET] that a bar shows: from 0.01 % to 100 %


def conversation_html(turns: Sequence[Turn], names: Sequence[str]) -> str:
    """Returns all turns, the answers of several models of these names side by side where there is room."""
    shown = "".join(_turn(turn, names) for turn in turns) or f'<div class="note">{escape(_nobody_spoke(names))}</div>'
    return f'<div class="conversation"><div>{shown}</div></div>'


def _nobody_spoke(names: Sequence[str]) -> str:
    return f"{'Models' if len(names) > 1 else 'Model'}: {', '.join(map(_short, names))}"


def _short(name: str) -> str:
    """Returns a path, of a package's .gguf file, which lies deep, its name; others are told apart by their folders."""
    return Path(name).name if name.endswith(".gguf") else name


def _turn(turn: Turn, names: Sequence[str]) -> str:
    answers = "".join(_answer(answer, name, len(names) > 1) for answer, name in zip(turn.answers, names, strict=True))
    return f'<section><div class="asked">{escape(turn.message)}</div><div class="answers">{answers}</div></section>'


def _answer(answer: Answer, name: str, is_named: bool) -> str:
    head = f'<div class="model">{escape(_short(name))}</div>' if is_named else ""
    drafts = "".join(map(_draft, answer.drafts))
    text = "".join(map(_token, answer.pieces))
    if answer.ended:
        below = f'<div class="note">{escape(_note(answer))}</div>'
    else:
        text, below = text + '<span class="caret"></span>', ""
    return f'<article>{head}{drafts}<div class="reply">{text}</div>{below}</article>'


def _draft(draft: Draft) -> str:
    text = "".join(map(_token, draft.pieces))
    chance = draft.reset_logprob
    share = "" if chance is None else f'<span class="chance"> {_percent(chance)}</span>'
    mark = f'<span class="reset-mark">[RESET]{share}</span>'
    return f'<div class="withdrawn"><del>{text}</del>{mark}<span class="instead">a draft was taken back</span></div>'


def _token(piece: TokenText) -> str:
    if piece.reset_logprob is None:
        return f"<span>{escape(piece.text)}</span>"
    height = max(0.0, 1 + piece.reset_logprob / math.log(10) / DECADES)
    bar = f' style="--bar:{height:.2f}"' if height >= 0.005 else ""
    return f'<span title="[RESET] {_percent(piece.reset_logprob)}"{bar}>{escape(piece.text)}</span>'


def _percent(logprob: float) -> str:
    share = 100 * math.exp(logprob)
    return f"{share:.1f} %" if share >= 0.1 else f"{share:.1g} %" if share >= 1e-4 else "below 0.0001 %"


def _note(answer: Answer) -> str:
    """Returns what stands below an answer that has ended."""
    if answer.error:
        return f"error: {answer.error}"
    if answer.stopped:
        return "stopped: the models do not see this turn again"
    resets, tokens = answer.reply.resets, answer.reply.num_tokens
    parts = [f"{resets} reset{'' if resets == 1 else 's'}", f"{tokens} token{'' if tokens == 1 else 's'}"]
    if answer.reply.finish_reason == "length":
        parts.append("cut off: out of room")
    likely = max((piece for piece in answer.pieces if piece.reset_logprob is not None), key=_chance, default=None)
    if likely:
        parts.append(f"[RESET] at most {_percent(likely.reset_logprob)} in the reply")
    return " · ".join(parts)


def _chance(piece: TokenText) -> float:
    return piece.reset_logprob
