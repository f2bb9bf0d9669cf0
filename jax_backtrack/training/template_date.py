"""One date for a whole run, where the chat template prints today's: its tokens stay what they were when it goes on."""

import copy
import datetime
import json
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jax_backtrack.distributed import hosts
from jax_backtrack.tokenizer import chat_template
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.utils.console import console


def with_recorded_date(config: ConfigDict, recipe_file: Path) -> ConfigDict:
    """Returns the recipe with the date that a run was begun on, by its recipe file, unless it sets another one."""
    if config.model.template_date or not recipe_file.exists():
        return config
    return _with_date(config, json.loads(recipe_file.read_text()).get("model", {}).get("template_date") or "")


def pin_date(config: ConfigDict, tokenizer: ChatTokenizer) -> ConfigDict:
    """Has the tokenizer print one date for the whole run, that of the recipe or the first host's today.

    Returns the recipe with that date, unchanged where the chat template prints none. Of several processes all must
    call this.
    """
    if not tokenizer.prints_date:
        if config.model.template_date:
            console.print("model.template_date is not used: the chat template prints no date", highlight=False)
        return config
    date = config.model.template_date or _today().isoformat()
    tokenizer.template_date = datetime.date.fromisoformat(date)
    console.print(f"the chat template prints the date: in this run it is {date}", highlight=False)
    return _with_date(config, date)


def _with_date(config: ConfigDict, date: str) -> ConfigDict:
    dated = copy.deepcopy(config)
    dated.model.template_date = date
    return dated


def _today() -> datetime.date:
    """Returns the first host's date: it may be another day on the others."""
    day = chat_template.now().date().toordinal()
    if hosts.several():
        day = int(multihost_utils.broadcast_one_to_all(np.int32(day)))
    return datetime.date.fromordinal(day)
