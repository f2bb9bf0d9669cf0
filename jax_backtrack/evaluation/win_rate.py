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
        return [min(chances) > 0.5 for chances in self.chances]

    @property
    def losses(self) -> list[bool]:
        return [max(chances) < 0.5 for chances in self.chances]

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
                        "wins": sum(win_rate.wins),
                        "ties": win_rate.ties,
                        "losses": sum(win_rate.losses),
                        "win_rate": win_rate.win_rate,
                        "p_value": win_rate.p_value,
                        "chances": win_rate.chances,
                    }
                    for model, win_rate in models.items()
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
        differing, our_texts, their_texts = ([texts[i] for i in differ] for texts in (prompts, ours, theirs))
        chances_Nx2[differ, 0] = judge(differing, our_texts, their_texts)
        chances_Nx2[differ, 1] = 1 - judge(differing, their_texts, our_texts)
    return WinRate(tuple(map(tuple, chances_Nx2.tolist())))


def against_baseline(judge: PairwiseJudge, models: dict[str, Evaluation]) -> WinRates:
    """Judges all models but the first, the baseline, on the harmless sets that both were asked.

    First samples count. Sets that were asked for the trade-off alone are left out.
    """
    (first, baseline), *others = models.items()
    win_rates: dict[str, dict[str, WinRate]] = {}
    for model, evaluation in others:
        for result in evaluation.results:
            of_baseline = baseline.of(result.title)
            if result.harmful or result.condition.reset_bias is not None or of_baseline is None:
                continue
            check_comparable(result, of_baseline, model, first)
            win_rates.setdefault(result.title, {})[model] = win_rate(
                judge, result.prompts(), _replies(result), _replies(of_baseline)
            )
    return WinRates(judge.name, win_rates)


def _replies(result: EvalResult) -> list[str]:
    return [samples[0].reply.text for samples in result.responses]
