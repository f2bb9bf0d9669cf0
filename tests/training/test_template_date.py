"""A chat template that prints today's date prints one date in a run, however long it takes and wherever it runs."""

import copy
import datetime
import json
import signal

import numpy as np
import pytest

from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import load
from jax_backtrack.hub.settings import load_model
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, with_reset
from jax_backtrack.training.loop import train
from tests.chat_tokenizers import DATED, EARLY, LATE, conversation
from tests.processes import HANG
from tests.runs import flags_of, leaves, metrics, recipe, run_main


@pytest.fixture
def dated(tmp_path) -> str:
    path = tmp_path / "dated.jinja"
    path.write_text(DATED)
    return str(path)


def test_a_tokenizer_prints_the_date_that_it_is_given(tokenizer, dated, in_zone):
    in_zone(EARLY)
    made = ChatTokenizer(copy.deepcopy(tokenizer.hf), chat_template=dated)
    assert made.prints_date and not tokenizer.prints_date
    messages = conversation(("user", "Hi"))
    today = made.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert made.render(messages).tolist() == today
    made.template_date = datetime.date(2026, 11, 27)
    pinned = with_reset(made)
    for each in (made, pinned):
        assert "Today Date: 27 Nov 2026" in each.decode(each.render(messages))
        (turn,) = each.render_turns(messages, ["Hello"])
        assert turn.prompt.tolist() == each.render(messages).tolist()


def test_the_date_of_a_recipe_is_a_date(base, tmp_path):
    config = recipe(base)
    config.model.template_date = "27 Nov 2026"
    with pytest.raises(
        InputError, match=r"model\.template_date is '27 Nov 2026'; it must be a date such as '2026-11-27'"
    ):
        train(config, tmp_path / "w")


def test_a_run_goes_on_the_next_day(base, dated, tmp_path, in_zone, capsys):
    """Bit for bit as one that was run on its first day, by its recipe's own date."""
    fields = dict(steps=8, checkpoint_every_steps=2)
    first_day = in_zone(EARLY)
    config = recipe(base, **fields)
    config.model.chat_template = dated
    killed = tmp_path / "killed"
    flags = [*flags_of(base, killed, **fields), f"--config.model.chat_template={dated}"]
    process = run_main(*flags, signalled=signal.SIGKILL)  # with the environment's time zone
    output = process.communicate(timeout=HANG)[0]
    assert process.returncode == -signal.SIGKILL and not (killed / "export").exists(), output
    assert json.loads((killed / "recipe.json").read_text())["model"]["template_date"] == first_day.isoformat()
    assert in_zone(LATE) != first_day
    model, tokenizer = train(config, killed)
    assert "resumed from step" in capsys.readouterr().out
    assert tokenizer.template_date == first_day and config.model.template_date == ""
    pinned = copy.deepcopy(config)
    pinned.model.template_date = first_day.isoformat()
    whole, _ = train(pinned, tmp_path / "whole")
    for one, other in zip(leaves(whole), leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)
    kept = [[line | {"seconds": 0} for line in metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert kept[0] == kept[1]
    assert f"| model.template_date | `{first_day}` |" in (killed / "export" / "README.md").read_text()
    train(config, killed)  # finished: left as it is
    pinned.model.template_date = "2020-01-01"
    with pytest.raises(InputError, match=r"begun with other settings \(model\.template_date\)"):
        train(pinned, killed)


def test_sampling_prints_today_unless_the_recipe_says_another_day(base, dated, in_zone):
    config = recipe(base)
    config.model.chat_template = dated
    mesh = make_mesh(1, 1, 1)
    for zone in (EARLY, LATE):
        today = in_zone(zone)
        _, tokenizer = load_model(config, str(base), mesh, load=load)
        assert f"Today Date: {today:%d %b %Y}" in tokenizer.decode(tokenizer.render(conversation(("user", "Hi"))))
    config.model.template_date = "2026-01-31"
    _, tokenizer = load_model(config, str(base), mesh, load=load)
    assert "Today Date: 31 Jan 2026" in tokenizer.decode(tokenizer.render(conversation(("user", "Hi"))))


def test_a_date_that_no_template_prints_is_said(base, tmp_path, capsys):
    config = recipe(base, steps=1)
    config.model.template_date = "2026-01-31"
    train(config, tmp_path / "w")
    assert "model.template_date is not used: the chat template prints no date" in capsys.readouterr().out
