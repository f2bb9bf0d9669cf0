"""With local paths nothing asks the network, whatever the environment allows; a Hub id does."""

import subprocess

import pytest

from tests import processes
from tests.runs import flags_of

ASKED = 77
# main.py, which ends where anything looks up a name or connects.
WATCHED = f"""
import os, runpy, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print("asked the network:", event, arguments, flush=True)
        os._exit({ASKED})

sys.addaudithook(watch)
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


def run(*arguments) -> tuple[int, str]:
    process = processes.start("-c", WATCHED, *arguments, stderr=subprocess.STDOUT, HF_HUB_OFFLINE="0")
    output = process.communicate(timeout=processes.HANG)[0]
    return process.returncode, output


def test_training_and_evaluation_of_what_is_local_ask_nothing(base, tmp_path):
    flags = flags_of(base, tmp_path, steps=2, max_seq_len=128)
    evaluation = ["--mode=evaluate", "--config.evaluate.prompts=4", "--config.sample.max_new_tokens=8"]
    for more in ([], evaluation):
        code, output = run(*flags, *more)
        assert code == 0, output


@pytest.mark.parametrize("field", ["model.path", "data.path"])
def test_a_hub_id_is_asked_for(base, tmp_path, field):
    code, output = run(*flags_of(base, tmp_path, steps=2), f"--config.{field}=owner/name")
    assert code == ASKED and "asked the network" in output
