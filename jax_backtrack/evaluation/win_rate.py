"""Win rate: on how many prompts a judge prefers one model's reply to a baseline's, shown in both orders."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_backtrack.evaluation.judges.pairwise import PairwiseJudge
from jax_backtrack.evaluation.results import EvalResult, Evaluation, check_comparable
from jax_backtrack.evaluation.stats import Estimate, paired, wilson
from jax_backtrack.tokenizer.chat_tokenizer import Message


@dataclasses.dataclass(frozen=True)
class WinRate:
    """One model against the baseline on the same prompts.

    chances: for each prompt the probability that the model's reply is the better one, where it is shown first and
             where it is shown second. It wins where both are above one half, loses where both are below, else it is a
             tie: the order decided. The same text twice is a tie of one half each, and the judge is not asked
    """

    chances: tuple[tuple[float, float], ...]

    @property
    def wins(self) -> list[bool]:
        return [min(both) > 0.5 for both in self.chances]

    @property
    def losses(self) -> list[bool]:
        return [max(both) < 0.5 for both in self.chances]

    @property
    def ties(self) -> int:
        return len(self.chances) - sum(self.wins) - sum(self.losses)

    @property
    def win_rate(self) -> Estimate:
        """Share of all prompts that are won; ties are not."""
        return wilson(self.wins)

    @property
    def p_value(self) -> float:
        """That wins and losses differ as much by chance: of the exact sign test, which leaves ties out."""
        return paired(self.wins, self.losses).p_value


@dataclasses.dataclass(frozen=True)
class WinRates:
    """judge: the name of the model that judged; of: set in its condition -> model -> its win rate"""

    judge: str
    of: dict[str, dict[str, WinRate]]

    def measures(self, model: str, result: EvalResult) -> dict[str, Estimate]:
        """Returns the model's measures of a set, with the share that it won where it was judged."""
        judged = self.of.get(result.title, {}).get(model)
        return result.measures | ({"win_rate": judged.win_rate} if judged else {})

    def as_json(self) -> dict:
        """Returns judge, and of every set and model counts, share with interval, p-value and chances of all prompts."""
        return {
            "judge": self.judge,
            "sets": {
                title: {
                    model: {
                        "wins": sum(one.wins),
                        "ties": one.ties,
                        "losses": sum(one.losses),
                        "win_rate": one.win_rate,
                        "p_value": one.p_value,
                        "chances": one.chances,
                    }
                    for model, one in models.items()
                }
                for title, models in self.of.items()
            },
        }


NOT_JUDGED = WinRates("", {})


def win_rate(
    judge: PairwiseJudge, prompts: Sequence[Sequence[Message]], ours: Sequence[str], theirs: Sequence[str]
) -> WinRate:
    """Judges replies of a model, `ours`, against those of the baseline to the same prompts."""
    chances_Nx2 = np.full((len(prompts), 2), 0.5)
    differ = [i for i in range(len(prompts)) if ours[i].strip() != theirs[i].strip()]
    if differ:
        asked, here, there = ([each[i] for i in differ] for each in (prompts, ours, theirs))
        chances_Nx2[differ, 0] = judge(asked, here, there)
        chances_Nx2[differ, 1] = 1 - judge(asked, there, here)
    return WinRate(tuple(map(tuple, chances_Nx2.tolist())))


def against_baseline(judge: PairwiseJudge, models: dict[str, Evaluation]) -> WinRates:
    """Judges all models but the first, the baseline, on the harmless sets that both were asked.

    First samples count. Sets that were asked for the trade-off alone are left out.
    """
    (first, baseline), *others = models.items()
    found: dict[str, dict[str, WinRate]] = {}
    for model, evaluation in others:
        for one in evaluation.results:
            there = baseline.of(one.title)
            if one.harmful or one.condition.reset_bias is not None or there is None:
                continue
            check_comparable(one, there, model, first)
            found.setdefault(one.title, {})[model] = win_rate(judge, one.prompts(), _replies(one), _replies(there))
    return WinRates(judge.name, found)


def _replies(result: EvalResult) -> list[str]:
    return [samples[0].reply.text for samples in result.responses]
