"""Formats whose replies are ranked or rated: utility data, in which the rejected reply is worse, not unsafe."""

import collections
import re
from collections.abc import Iterable, Iterator, Sequence

from jax_backtrack.data.conversations import as_messages, as_prompt, as_reply, join
from jax_backtrack.data.formats.format import Format, Made, Place, columns, field, number, pair, reply, text
from jax_backtrack.data.formats.labelled import by_prompt
from jax_backtrack.data.formats.pairs import instruction_messages
from jax_backtrack.data.preferences import BadRow, Preference, Report, is_blank
from jax_backtrack.tokenizer.chat_tokenizer import Message


def _best_and_worst(prompt: list[Message], rated: Sequence[tuple[float, object]], at: Place) -> Preference:
    """Prefers the reply with the highest rating to that with the lowest; of equal ones the first counts."""
    if not rated:
        raise BadRow("a prompt without replies")
    (best, chosen), (worst, rejected) = (pick(rated, key=lambda entry: entry[0]) for pick in (max, min))
    if len(rated) > 1 and best == worst:
        raise BadRow("all replies are rated alike")
    chosen = join(prompt, as_reply(chosen, "reply"))
    at = Place(at.origin, False)
    return reply(chosen, at) if len(rated) == 1 else pair(chosen, join(prompt, as_reply(rejected, "reply")), at)


def _objects(row: dict, name: str) -> list[dict]:
    value = field(row, name)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise BadRow(f"the field {name!r} is not a list of objects")
    return value


def _nectar(row: dict, at: Place) -> Preference:
    rated = [(-number(answer, "rank"), text(answer, "answer")) for answer in _objects(row, "answers")]
    return _best_and_worst(as_prompt(field(row, "prompt"), "prompt"), rated, at)


def _ultrafeedback(row: dict, at: Place) -> Preference:
    rated = [
        (number(completion, "overall_score"), text(completion, "response"))
        for completion in _objects(row, "completions")
    ]
    return _best_and_worst(instruction_messages(row), rated, at)


def _distilabel(row: dict, at: Place) -> Preference:
    generations, ratings = field(row, "generations"), field(row, "ratings")
    if not all(isinstance(value, list) for value in (generations, ratings)) or len(generations) != len(ratings):
        raise BadRow("the fields 'generations' and 'ratings' are not equally long lists")
    rated = [
        (number({"ratings": rating}, "ratings"), generation)
        for generation, rating in zip(generations, ratings, strict=True)
    ]
    return _best_and_worst(instruction_messages(row), rated, at)


def _helpsteer3(row: dict, at: Place) -> Preference:
    """Prefers the first response below 0, the second one above it."""
    preference = number(row, "overall_preference")
    if not preference:
        raise BadRow("all replies are rated alike")
    rated = [(-preference, field(row, "response1")), (preference, field(row, "response2"))]
    return _best_and_worst(as_messages(field(row, "context"), "context"), rated, at)


# HelpSteer2 parts the turns of a prompt so.
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _helpsteer2_prompt(prompt: str) -> list[Message]:
    first, *turns = _HELPSTEER_TURN.split(prompt)
    turns_by_role = zip(("User", *turns[::2]), (first, *turns[1::2]), strict=True)
    messages = [{"role": speaker.lower(), "content": content} for speaker, content in turns_by_role]
    if len(messages) > 1 and messages[-1]["role"] == "assistant" and is_blank(messages[-1]["content"]):
        del messages[-1]  # where the reply begins
    return messages if len(messages) > 1 else as_prompt(prompt, "prompt")


def _helpsteer2_pair(row: dict, at: Place) -> Preference:
    """Prefers the first response below 0, the second one above it."""
    strength = number(row, "preference_strength")
    if not strength:
        raise BadRow("all replies are rated alike")
    rated = [(-strength, field(row, "response_1")), (strength, field(row, "response_2"))]
    return _best_and_worst(_helpsteer2_prompt(text(row, "prompt")), rated, at)


def _helpsteer2(rows, report: Report, _backtracks: bool) -> Iterator[Made]:
    """Rows of one prompt make one pair, of the most and the least helpful reply."""
    for group in by_prompt(rows, report, lambda row: (number(row, "helpfulness"), row["response"])).values():
        origin, row, _ = group[0]
        prompt, rated = row["prompt"], [rated for _, _, rated in group]
        yield (
            origin,
            lambda prompt=prompt, rated=rated, origin=origin: _best_and_worst(
                _helpsteer2_prompt(prompt), rated, Place(origin, False)
            ),
        )
        for between, _, _ in group[2:]:
            report.drop("neither the best nor the worst reply to its prompt", between)


# ------------------------------------------------------------------------------------------------------- OASST


def _oasst(rows: Iterable[tuple[str, dict]], report: Report, _backtracks: bool) -> Iterator[Made]:
    """Reads first questions in English with their replies by rank: the best is chosen, the worst rejected."""
    questions, replies = [], collections.defaultdict(list)
    for origin, row in rows:
        if not all(isinstance(row.get(name), str) for name in ("message_id", "role", "text")):
            report.drop("a message without message_id, role or text", origin)
        elif not isinstance(row.get("parent_id"), (str, type(None))):
            report.drop("a parent_id is not a text", origin)
        elif row.get("deleted"):
            report.drop("a deleted message", origin)
        elif row.get("lang") != "en":
            report.drop("not English", origin)
        elif row.get("parent_id") is None:
            questions.append((origin, row))
        else:
            replies[row["parent_id"]].append((origin, row))
    first = {row["message_id"] for _, row in questions}
    for parent, messages in replies.items():
        if parent not in first:
            for origin, _ in messages:
                report.drop("a later turn of a conversation", origin)
    for origin, question in questions:
        answers = [row for _, row in replies.get(question["message_id"], ())]
        yield origin, lambda question=question, answers=answers, origin=origin: _from_tree(question, answers, origin)


def _from_tree(question: dict, replies: list[dict], origin: str) -> Preference:
    if not replies:
        raise BadRow("a question without a reply")
    ranks = [reply["rank"] for reply in replies if reply.get("rank") is not None]
    if not all(isinstance(rank, (int, float)) and rank == rank for rank in ranks):  # NaN does not equal itself
        raise BadRow("a rank is not a number")
    ranked = sorted((reply for reply in replies if reply.get("rank") is not None), key=lambda reply: reply["rank"])
    if len(replies) > 1 and not ranked:
        raise BadRow("replies without ranks")
    best, at = ranked[0] if ranked else replies[0], Place(origin, False)
    prompt = [{"role": "user", "content": question["text"]}]
    chosen = [*prompt, *as_reply(best["text"], "text")]
    return pair(chosen, [*prompt, *as_reply(ranked[-1]["text"], "text")], at) if len(ranked) > 1 else reply(chosen, at)


BY_MANY_COLUMNS = (
    Format(
        "oasst",
        columns("message_id role text"),
        columns("parent_id deleted lang rank"),
        gather=_oasst,
        when=lambda rows: any("parent_id" in row for row in rows),
        holds="OASST: one message a row; the best and the worst reply to first questions in English",
    ),
    Format(
        "helpsteer3",
        columns("context response1 response2 overall_preference"),
        read=_helpsteer3,
        holds="HelpSteer3: `context`, two responses, `overall_preference`",
    ),
    Format(
        "nectar",
        columns("prompt answers"),
        inner=columns("answers.answer answers.rank"),
        read=_nectar,
        when=lambda rows: any(isinstance(row.get("answers"), list) for row in rows),
        holds="Nectar: the answers of the best and the worst rank",
    ),
    Format(
        "ultrafeedback",
        columns("instruction completions"),
        columns("input system history"),
        inner=columns("completions.response completions.overall_score"),
        read=_ultrafeedback,
        holds="UltraFeedback: the completions of the highest and the lowest `overall_score`",
    ),
    Format("helpsteer2", columns("prompt response_1 response_2 preference_strength"), read=_helpsteer2_pair),
)
# What these need, formats of pairs may have too.
BY_FEW_COLUMNS = (
    Format(
        "distilabel",
        columns("instruction generations ratings"),
        columns("input system history"),
        read=_distilabel,
        holds="distilabel: the generations of the highest and the lowest rating",
    ),
    Format(
        "helpsteer2",
        columns("prompt response helpfulness"),
        gather=_helpsteer2,
        holds="HelpSteer2: the most and the least helpful response to a prompt, or `preference_strength` of two",
    ),
)
