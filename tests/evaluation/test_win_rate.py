"""Win rates: what counts as won, and in the comparison of evaluations. `test_smollm.py` has a judge of real weights."""

import json

import pytest
from scipy.stats import binomtest

from configs import sft_smollm
from jax_backtrack import cli
from jax_backtrack.evaluation import results
from jax_backtrack.evaluation.judges.pairwise import question
from jax_backtrack.evaluation.results import Condition, EvalResult, Evaluation, Response
from jax_backtrack.evaluation.win_rate import WinRate
from jax_backtrack.hub.export import save
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.utils.workdir import EVALUATION
from tests import tiny
from tests.evaluations import SETS, user


def test_a_reply_wins_where_it_is_preferred_in_both_orders():
    found = WinRate(((0.9, 0.8), (0.9, 0.2), (0.1, 0.2), (0.5, 0.5)))
    assert (found.wins, found.losses, found.ties) == ([True, False, False, False], [False, False, True, False], 2)
    assert (found.win_rate.value, found.win_rate.count) == (0.25, 4) and found.win_rate.low < 0.25 < found.win_rate.high


def test_the_p_value_is_that_of_the_sign_test_without_ties():
    found = WinRate(((0.9, 0.8),) * 8 + ((0.1, 0.1),) * 1 + ((0.5, 0.5),) * 5)
    assert found.p_value == pytest.approx(binomtest(8, 9).pvalue)


def test_a_question_holds_all_that_was_said_as_it_stands():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{first}?"}]
    asked = question(prompt, "{second}", "[Reply A]")
    assert "[System]\nBe brief.\n\n[User]\n{first}?\n" in asked
    assert "[Reply A]\n{second}\n[End" in asked and "[Reply B]\n[Reply A]\n[End" in asked


def harmless(*texts: str) -> EvalResult:
    """A question for each reply."""
    responses = tuple(
        (Response(user(f"Why {place}?"), "", Reply(text, (), "stop"), 0.0, 0.0),) for place, text in enumerate(texts)
    )
    return EvalResult("XSTest", False, Condition(), responses)


def test_compared_evaluations_are_judged_as_the_recipe_says(tokenizer, tmp_path, capsys):
    save(tiny.model(vocab_size=49152, max_position_embeddings=1024), tokenizer, tmp_path / "judge")
    trade_off = tuple(one for one in SETS if one.condition.reset_bias != 0)
    for model, texts in {"one": ("So.", "Thus.", "Same."), "two": ("No.", "Because.", "Same. ")}.items():
        found = Evaluation((harmless(*texts), *trade_off))
        results.write({model: found}, tmp_path / model / EVALUATION)
    config = sft_smollm.get_config()
    config.evaluate.win_rate_judge, config.evaluate.false_resets = str(tmp_path / "judge"), 0.6
    compared = [str(tmp_path / model) for model in ("one", "two")]
    assert cli.run("compare", config, str(tmp_path), workdirs=compared) == 0
    assert "preferred to one, by judge" in capsys.readouterr().out
    html, rates = (tmp_path / "comparison.html").read_text(), json.loads((tmp_path / "win_rates.json").read_text())
    assert "at most 60 % of false resets" in html and "two: bias +2<" in html
    assert "Preferred to one" in html and rates["judge"] == "judge"
    won = rates["sets"]["XSTest"]["two"]
    assert list(rates["sets"]["XSTest"]) == ["two"] and won["wins"] + won["ties"] + won["losses"] == 3
    assert won["chances"][2] == [0.5, 0.5] and 0.5 not in won["chances"][0]
    assert won["win_rate"] == vars(WinRate(tuple(map(tuple, won["chances"]))).win_rate)
