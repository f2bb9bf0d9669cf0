"""Formats whose replies are labelled safe or unsafe: only a pair with exactly one safe reply is taken back."""

import collections
from collections.abc import Iterable, Iterator

from jax_backtrack.data.conversations import as_prompt, as_reply, join
from jax_backtrack.data.formats.format import Format, Made, Place, columns, field, flag, number, reply, text
from jax_backtrack.data.formats.pairs import replies_to
from jax_backtrack.data.preferences import BadRow, Preference, Report, is_blank


def _pair(row: dict, safe: str, unsafe: str, at: Place) -> Preference:
    return replies_to(row, as_prompt(field(row, "prompt"), "prompt"), safe, unsafe, at)


def _check_labels(safe: tuple[bool, bool], at: Place) -> None:
    """Raises BadRow for a pair whose labels do not fit what it is wanted for."""
    if not at.backtracks and not all(safe):
        raise BadRow("a reply is labelled unsafe, which utility data must not have")
    if at.backtracks and all(safe):
        raise BadRow("both replies are labelled safe")
    if not any(safe):
        raise BadRow("both replies are labelled unsafe")


def _hh_safety(row: dict, at: Place) -> Preference:
    safe = flag(row, "chosen_safety"), flag(row, "rejected_safety")
    _check_labels(safe, at)
    if at.backtracks and not safe[0]:
        raise BadRow("the chosen reply is labelled unsafe, and the rejected one safe")
    return _pair(row, "chosen_response", "rejected_response", at)


def _pku(row: dict, at: Place) -> Preference:
    """Chooses the safe reply; of two safe ones, in utility data, the better one."""
    safe = flag(row, "is_response_0_safe"), flag(row, "is_response_1_safe")
    _check_labels(safe, at)
    first = safe.index(True) if at.backtracks else _better(row)
    return _pair(row, f"response_{first}", f"response_{1 - first}", at)


def _better(row: dict) -> int:
    if (better := number(row, "better_response_id")) not in (0, 1):
        raise BadRow("the field 'better_response_id' is neither 0 nor 1")
    return int(better)


def by_prompt(rows: Iterable[tuple[str, dict]], report: Report, label) -> dict[str, list[tuple[str, dict, object]]]:
    """Returns the rows of each prompt with their places and labels; those without prompt or label are counted."""
    groups = collections.defaultdict(list)
    for origin, row in rows:
        try:
            if is_blank(text(row, "response")):
                raise BadRow("a reply is empty")
            groups[text(row, "prompt")].append((origin, row, label(row)))
        except BadRow as reason:
            report.drop(str(reason), origin)
    return groups


def _reply_of(row: dict, origin: str) -> Preference:
    prompt = as_prompt(row["prompt"], "prompt")
    return reply(join(prompt, as_reply(field(row, "response"), "response")), Place(origin, False))


def _gather(label, alone: bool):
    """Returns a reader that pairs the safe replies of a prompt with its unsafe ones, in their order, each of them once.

    alone: a safe reply that has no unsafe one beside it is used as a reply; else it is dropped
    """

    def gather(rows, report: Report, backtracks: bool) -> Iterator[Made]:
        for group in by_prompt(rows, report, label).values():
            safe = [(origin, row) for origin, row, is_safe in group if is_safe]
            unsafe = [(origin, row) for origin, row, is_safe in group if not is_safe]
            pairs = list(zip(safe, unsafe, strict=False)) if backtracks else []
            for (origin, row), (_, unsafe_row) in pairs:
                whole = {"prompt": row["prompt"], "safe": row.get("response"), "unsafe": unsafe_row.get("response")}
                yield origin, lambda whole=whole, origin=origin: _pair(whole, "safe", "unsafe", Place(origin, True))
            for origin, row in safe[len(pairs) :]:
                if alone or not backtracks:
                    yield origin, lambda row=row, origin=origin: _reply_of(row, origin)
                else:
                    report.drop("no unsafe reply to the same prompt is left to pair it with", origin)
            for origin, _ in unsafe[len(pairs) :]:
                report.drop("an unsafe reply, and no safe one to the same prompt is left to pair it with", origin)

    return gather


def _wildguard_label(row: dict) -> bool:
    """Returns whether the reply is safe. Only words say which way the label goes: of 1 and "yes" it is not known."""
    label = field(row, "response_harm_label")
    if label not in ("harmful", "unharmful"):
        raise BadRow("the field 'response_harm_label' is neither 'harmful' nor 'unharmful'")
    return label == "unharmful"


def _wildjailbreak(row: dict, at: Place) -> Preference:
    """Reads a prompt, as it is or in an adversarial wording, with a safe reply; there is none that is worse."""
    kind = text(row, "data_type")
    question = text(row, "adversarial" if kind.startswith("adversarial") else "vanilla")
    return reply(join(as_prompt(question, "vanilla"), as_reply(text(row, "completion"), "completion")), at)


FORMATS = (
    Format(
        "hh-rlhf-safety",
        columns("prompt chosen_response chosen_safety rejected_response rejected_safety"),
        read=_hh_safety,
        holds="hh-rlhf-safety-v3, the paper's: pairs whose chosen reply is safe and whose rejected reply is not",
    ),
    Format(
        "pku-saferlhf",
        columns("prompt response_0 response_1 is_response_0_safe is_response_1_safe"),
        columns("better_response_id"),
        read=_pku,
        holds="PKU-SafeRLHF: pairs of which exactly one reply is safe, whichever is called better",
    ),
    Format(
        "beavertails",
        columns("prompt response is_safe"),
        gather=_gather(lambda row: flag(row, "is_safe"), alone=False),
        holds="BeaverTails: each prompt's safe replies, paired with its unsafe ones",
    ),
    Format(
        "wildguardmix",
        columns("prompt response response_harm_label"),
        gather=_gather(_wildguard_label, alone=True),
        holds="WildGuardMix: as BeaverTails; a safe reply without an unsafe one is a reply",
    ),
    Format(
        "wildjailbreak",
        columns("vanilla completion data_type"),
        columns("adversarial"),
        read=_wildjailbreak,
        holds="WildJailbreak: the `vanilla` or `adversarial` prompt and a safe reply; none is worse",
    ),
)
