"""A conversation in the terminal."""

import os
import re
import select
import subprocess
import time

import pytest

from jax_backtrack import Sampler, SamplingParams
from jax_backtrack.hub.export import save
from jax_backtrack.sampling.seeds import reply_seed
from jax_backtrack.serving.chat import chat
from jax_backtrack.utils.drafts import readable
from tests import tiny
from tests.processes import HANG, ROOT, start

UP, HIDE_CURSOR, SHOW_CURSOR = r"\x1b\[1A", "\x1b[?25l", "\x1b[?25h"


def test_drafts_are_struck_through_and_do_not_stand_in_the_conversation(reset_tokenizer, capsys):
    model = tiny.model(vocab_size=49152)
    sampler = Sampler(model, reset_tokenizer, SamplingParams(max_new_tokens=6, reset_bias=[-1e9, -1e9, 1e9], seed=5))
    first = next(iter(sampler(["hello"], seeds=[reply_seed(5, 0)])))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first.text}]
    second = next(iter(sampler([[*turns, {"role": "user", "content": "and you?"}]], seeds=[reply_seed(5, 1)])))
    anew = next(iter(sampler(["hello"], seeds=[reply_seed(5, 3)])))
    too_long = "x " * 300
    chat(sampler, ["hello", "and you?", "/new", "hello", too_long, "/new"])
    shown = capsys.readouterr().out
    for reply in (first, second, anew):
        assert len(reply.drafts) == 1
        assert f" [RESET] {readable(reply.text)}\n" in shown  # in one line, however long: nobody's terminal breaks it
    struck = re.findall("~~(.+?)~~", shown)  # whole words only: one that was not finished was not shown
    assert struck and first.drafts[0].startswith(struck[0].rstrip())
    assert "exceed the model's 256 positions" in " ".join(shown.split())


def test_a_model_that_cannot_reset_says_so(tokenizer, capsys):
    chat(Sampler(tiny.model(vocab_size=49152), tokenizer, SamplingParams(max_new_tokens=2)), ["hello"])
    assert "has no [RESET]" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_shown_instead():
    assert readable("a\x1b[2Jb\x07\r\x9b1m\tc\nd \U0001f9a9") == "a\\x1b[2Jb\\x07\\x0d\\x9b1m\tc\nd \U0001f9a9"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, reset_tokenizer):
    """A chat with a tiny model that writes for a while, as a command line."""
    workdir = tmp_path_factory.mktemp("chat")
    save(tiny.model(vocab_size=49152, max_position_embeddings=8192), reset_tokenizer, workdir / "export")
    settings = ["--config.sample.max_new_tokens=2000", "--config.sample.max_resets=0"]
    return [ROOT / "main.py", "--config=sft_smollm.py", "--mode=chat", f"--workdir={workdir}", *settings]


# Runs the rest of the command line in a terminal of its own, of 30 columns and 8 lines.
IN_A_TERMINAL = """
import os, pty, sys
shell = ["sh", "-c", 'stty cols 30 rows 8; exec "$@"', "sh", sys.executable]
sys.exit(os.waitstatus_to_exitcode(pty.spawn(shell + sys.argv[1:])))
"""


def test_ctrl_c_ends_a_reply_and_then_the_chat(arguments):
    """The reply outgrows the terminal, so what is drawn again is never higher than that."""
    environment = dict(TERM="xterm-256color", COLUMNS="", LINES="")
    process = start("-c", IN_A_TERMINAL, *arguments, stdin=subprocess.PIPE, stderr=subprocess.STDOUT, **environment)
    screen = _Screen(process)
    screen.type("", "you  ")
    screen.type("hello\n", rf"(?:{UP}\x1b\[2K){{6}}")  # seven lines are drawn again
    screen.type("\x03", "stopped: the", "you  ")
    # A signal between Python's prompt and its wait for a line is only seen with the next line, which may be empty.
    screen.type("\x03", "ended", again="\n")
    assert process.wait(timeout=HANG) == 0
    assert "Traceback" not in screen.text
    heights = [len(re.findall(UP, moved)) for moved in re.findall(rf"(?:{UP}[^\x1b]*(?:\x1b\[2K)?)+", screen.text)]
    assert 6 <= max(heights) < 8
    assert screen.text.rfind(SHOW_CURSOR) > screen.text.rfind(HIDE_CURSOR) >= 0


def test_lines_that_are_no_text_are_named(arguments):
    process = start(*arguments, stdin=subprocess.PIPE, stderr=subprocess.STDOUT, PYTHONIOENCODING="utf-8:strict")
    process.stdin.buffer.write(b"caf\xe9\n")
    output = process.communicate()[0]
    assert process.returncode == 2 and "standard input is not UTF-8" in output and "Traceback" not in output


class _Screen:
    """What a terminal was sent so far."""

    def __init__(self, process: subprocess.Popen):
        self._process, self.text = process, ""

    def type(self, keys: str, *then: str, again: str = "") -> None:
        """Types, and waits until these patterns have come, one after the other; `again` is typed every second."""
        begun, limit, pattern = len(self.text), time.monotonic() + HANG, re.compile(".*?".join(then), re.DOTALL)
        self._write(keys)
        while not pattern.search(self.text, begun):
            assert time.monotonic() < limit, self.text[-2000:]
            if select.select([self._process.stdout], [], [], 1)[0]:
                more = os.read(self._process.stdout.fileno(), 65536).decode(errors="replace")
                assert more, self.text[-2000:]
                self.text += more
            else:
                self._write(again)

    def _write(self, keys: str) -> None:
        self._process.stdin.write(keys)
        self._process.stdin.flush()
