"""The page in the browser: what is drawn, by the real server, and in a real browser where there is one."""

import concurrent.futures
import dataclasses
import html
import importlib.util
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import sft_smollm
from jax_backtrack import Sampler, SamplingParams, TokenText, cli
from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.serving import web
from jax_backtrack.serving.conversation import Answer, Draft, Turn, answers, messages, worth_drawing
from jax_backtrack.serving.conversation_page import conversation_html
from jax_backtrack.utils.settings import check
from tests import tiny
from tests.conftest import missing
from tests.processes import HANG, ROOT, start

ATTACK = (
    "<script>hacked = 1</script><img src='http://localhost:1/' onerror='hacked = 1'>{{value}}${hacked = 1} & [RESET]"
)
NEW = 12

texts = st.text() | st.sampled_from([ATTACK, "</div>", '" onmouseover="hacked = 1', "&lt;"])
pieces = st.lists(st.builds(TokenText, texts, st.none() | st.floats(-400, 0)), max_size=3).map(tuple)
replies = st.builds(Reply, texts, st.just(()), st.sampled_from(["stop", "length"]), num_tokens=st.integers(0, 9))
drafts = st.lists(st.builds(Draft, pieces, st.none() | st.floats(-400, 0)), max_size=2).map(tuple)
any_answer = st.builds(Answer, drafts, pieces, st.none() | replies, texts, st.booleans())


class _Read(HTMLParser):
    """What a browser takes for text, and what for tags with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags, self.attributes = "", set(), set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


@given(texts, any_answer, texts)
def test_what_was_written_stays_text(message, answer, name):
    turn = Turn(message, (answer, answer))
    read = _Read(conversation_html([turn], [name, name]))
    assert read.tags <= {"div", "section", "article", "span", "del"} and read.attributes <= {"class", "title", "style"}
    written = [message, "".join(piece.text for piece in answer.pieces), answer.error]
    written += ["".join(piece.text for piece in draft.pieces) for draft in answer.drafts]
    assert all(text.replace("\r", "") in read.text.replace("\r", "") for text in written if "\0" not in text)


@given(st.lists(st.floats(0, 1), min_size=1))
def test_a_bar_is_as_high_as_reset_was_likely(chances):
    made = tuple(TokenText("word ", math.log(max(chance, 1e-9))) for chance in chances)
    page = conversation_html([Turn("", (Answer(pieces=made),))], [""])
    bars = [float(bar or 0) for bar in re.findall(r'<span title="[^"]*"(?: style="--bar:([\d.]+)")?>word ', page)]
    assert len(bars) == len(chances)
    for bar, chance in zip(bars, chances, strict=True):
        assert abs(bar - max(0, 1 + math.log10(max(chance, 1e-9)) / 4)) <= 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory, reset_tokenizer, tokenizer):
    """Tiny models, one with [RESET] and one without, as exports."""
    folder = tmp_path_factory.mktemp("web")
    save(tiny.model(vocab_size=49152), reset_tokenizer, folder / "backtracking" / "export")
    save(tiny.model(seed=1, vocab_size=49152), tokenizer, folder / "baseline")
    return folder / "backtracking", folder / "baseline"


@pytest.fixture(scope="module")
def samplers(reset_tokenizer, tokenizer):
    """The same models here, with the settings that the page will have."""
    backtracking, baseline = tiny.model(vocab_size=49152), tiny.model(seed=1, vocab_size=49152)
    params = SamplingParams(max_new_tokens=NEW, logprobs=True, max_num_seqs=2)
    return Sampler(backtracking, reset_tokenizer, params), Sampler(baseline, tokenizer, params)


@pytest.fixture(scope="module")
def resetting(samplers):
    """A question, and a bias with which the model resets behind the first words of a draft of its own."""
    questions = [f"question {number}" for number in range(16)]
    for question, reply in zip(questions, samplers[0].with_resets(max_resets=0)(questions), strict=True):
        lack = np.subtract(reply.trace.logprobs, reply.trace.reset_logprobs)  # of [RESET]'s logit to the likeliest's
        place = int(lack.argmin())
        bias = math.ceil(2 * lack[place] + 0.2) / 2  # a step of the slider
        if place >= 3 and bias < lack[:place].min() - 0.1:
            return question, bias
    raise AssertionError("no such question")


def conversation(
    samplers, asked: list[str], bias: float, prefill: str = "", hold_back: int = 0, seed: int = 0
) -> list[Turn]:
    biased, turns = [sampler.with_resets(reset_bias=bias) for sampler in samplers], []
    for number, message in enumerate(asked):
        *_, turn = answers(biased, turns, message, prefill=prefill, seed=seed + number, hold_back=hold_back)
        turns.append(turn)
    return turns


def test_a_conversation_grows_to_what_the_sampler_gives(samplers, resetting):
    question, bias = resetting
    turns = conversation(samplers, [question, "and then?"], bias, prefill="Well, ")
    for model, sampler in enumerate(samplers):
        sampler, said = sampler.with_resets(reset_bias=bias), []
        for number, turn in enumerate(turns):
            said.append({"role": "user", "content": turn.message})
            assert messages(turns[:number], model, turn.message) == said
            (reply,) = sampler([said], prefills=["Well, "], seeds=[number])
            answer = turn.answers[model]
            assert dataclasses.replace(answer.reply, trace=None) == dataclasses.replace(reply, trace=None)
            assert "".join(piece.text for piece in answer.pieces) == reply.text
            assert len(answer.drafts) == reply.resets
            said.append({"role": "assistant", "content": reply.text})
    assert turns[0].answers[0].drafts and not turns[0].answers[1].drafts


def test_what_was_stopped_or_failed_is_not_said_again(samplers):
    growing = answers(samplers, [], "first", prefill="", seed=0, hold_back=0)
    part = [next(growing) for _ in range(4)][-1].stop()
    growing.close()
    assert part.ended and all(answer.stopped for answer in part.answers)
    (failed,) = conversation(samplers, ["long " * 300], bias=0.0)
    assert all("exceed the model's 256 positions" in answer.error for answer in failed.answers) and failed.ended
    assert messages([part, failed], 0, "now") == [{"role": "user", "content": "now"}]


def test_a_system_message_stands_over_the_conversation(samplers):
    asked = dict(prefill="", seed=0, hold_back=0)
    *_, turn = answers(samplers, [], "Hello", system="Be brief.", **asked)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    for sampler, answer in zip(samplers, turn.answers, strict=True):
        (reply,) = sampler([said], seeds=[0])
        assert (answer.reply.text, answer.reply.drafts) == (reply.text, reply.drafts)


def test_of_a_turn_that_grows_the_first_state_and_the_last_are_drawn():
    growing = [Turn("", (Answer(pieces=(TokenText("word ", None),) * count),)) for count in range(500)]
    drawn = list(worth_drawing([*growing, growing[-1].stop()]))
    assert drawn[0] == growing[0] and drawn[-1].ended and len(drawn) < len(growing)


def test_a_session_that_is_stopped_or_cleared_takes_nothing_more(samplers):
    """Whatever a reply that is still being written does afterwards."""
    session = web.Session()

    def written(message, steps):
        grown = answers(samplers, session.turns, message, prefill="", seed=0, hold_back=0)
        growing = session.grow(grown)
        return [next(growing) for _ in range(steps)], growing

    (*_, last), growing = written("first", 4)
    session.stop()
    assert session.turns == [last.stop()] and not list(growing)
    _, growing = written("second", 4)
    *_, ended = growing
    assert session.turns == [last.stop(), ended] and ended.ended
    _, growing = written("third", 4)
    session.clear()
    assert not list(growing) and session.turns == []


def test_another_bias_or_hold_back_compiles_nothing(samplers):
    def compiled():
        return list(samplers[0].compiled), web_programs()

    def web_programs():
        from jax_backtrack.sampling import loop

        return [program._cache_size() for program in (loop.init_decode_state, loop.prefill, loop.insert, loop.decode)]

    conversation(samplers, ["hello"], bias=0.0)
    before = compiled()
    for bias, hold_back in ((-3.5, 0), (9, 4), (0.5, 32)):
        conversation(samplers, ["there"], bias, hold_back=hold_back)
    assert compiled() == before


def test_without_gradio_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-web\.txt"):
        web.page({})
    assert (ROOT / "requirements-web.txt").is_file()


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_that_cannot_be_are_named(port):
    config = sft_smollm.get_config()
    config.web.port = port
    with pytest.raises(InputError, match=f"web.port is {port}"):
        check(config)


@pytest.fixture(scope="module")
def served(folders, resetting):
    """Address of the page that `--mode=web` serves, with both models; Ctrl-C ends it, in the end."""
    if importlib.util.find_spec("gradio") is None:
        missing("gradio is not installed: pip install -r requirements-dev.txt")
    workdir, baseline = folders
    process = start(
        *[ROOT / "main.py", "--config=sft_smollm.py", "--mode=web", f"--workdir={workdir}"],
        *[f"--config.web.baseline={baseline}", "--config.web.port=0", f"--config.sample.max_new_tokens={NEW}"],
        *[f"--config.sample.reset_bias={resetting[1]}"],
        stderr=subprocess.STDOUT,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("page: "):
            yield line.removeprefix("page: ").strip()
            break
    process.send_signal(signal.SIGINT)
    output = "".join([*lines, process.communicate(timeout=HANG)[0]])
    assert process.returncode == 0 and "ended" in output and "Traceback" not in output, output


def test_the_page_is_for_this_machine_only(served):
    """It listens on one address, and tells browsers to load nothing from elsewhere."""
    port = int(served.rstrip("/").rpartition(":")[2])
    assert served.startswith("http://127.0.0.1:")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=HANG):
        pass
    with urllib.request.urlopen(served) as answer:
        policy = answer.headers["content-security-policy"]
    sources = {source for rule in policy.split(";") for source in rule.split()[1:]}
    assert "default-src 'self'" in policy and all(
        source[0] == "'" or source in ("data:", "blob:") for source in sources
    )


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(served, capsys):
    config, port = sft_smollm.get_config(), int(served.rstrip("/").rpartition(":")[2])
    config.web.port, config.model.path = port, "nothing"
    assert cli.run("web", config, "nothing") == 2
    assert f"web.port = {port} of 127.0.0.1 cannot be had" in " ".join(capsys.readouterr().out.split())


def test_sessions_have_their_own_conversations(served, samplers, folders, resetting):
    """Two at a time, with other settings: each gets what the samplers give, drawn, and nothing of the other's."""
    from gradio_client import Client

    question, bias = resetting
    names = list(map(str, folders))

    def talk(asked: list[str], bias: float, prefill: str, hold_back: int) -> list[str]:
        client = Client(served, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": HANG})
        return [client.predict(message, prefill, bias, hold_back, api_name="/reply")[1] for message in asked]

    talks = [([question, ATTACK], bias, "", 0), (["other", question], 0.0, ATTACK, 3)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        shown = list(pool.map(talk, *zip(*talks, strict=True)))
    for pages, talk_of_it in zip(shown, talks, strict=True):
        turns = conversation(samplers, *talk_of_it)
        for number, page in enumerate(pages, start=1):
            assert _Read(page).text == _Read(conversation_html(turns[:number], names)).text
        assert "<script" not in pages[-1] and "<img" not in pages[-1]
    assert "<del>" in shown[0][0] and html.escape(ATTACK) in shown[0][-1]


@pytest.fixture(scope="module")
def browser():
    """A real browser without a window. Where there is none, the tests above still cover the server."""
    if importlib.util.find_spec("playwright") is None:
        missing("playwright is not installed: pip install -r requirements-dev.txt")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(path).exists():
            # Not a failure in CI either: no Python package brings a browser, and not every machine can fetch one.
            pytest.skip("no Chromium: apt-get install chromium, or python -m playwright install chromium")
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=1000 * HANG)
        yield opened
        opened.close()


def test_a_draft_is_struck_through_in_a_browser(served, browser, resetting):
    """Sends, watches a retract, hides and shows drafts, compares; HTML that is typed and answered does nothing."""
    question, _ = resetting
    page, asked = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.set_default_timeout(1000 * HANG)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served)
    page.get_by_label("Message").fill(question)
    page.get_by_role("button", name="Send").click()
    page.locator("article .note").nth(1).wait_for()  # both models have answered
    draft, mark, instead = (page.locator(f"article >> nth=0 >> {part}") for part in ("del", ".reset-mark", ".instead"))
    assert "line-through" in draft.evaluate("it => getComputedStyle(it).textDecorationLine")
    assert draft.inner_text().strip() and mark.inner_text().startswith("[RESET]") and not instead.is_visible()
    assert page.locator("article >> nth=1 >> del").count() == 0
    page.get_by_label("Drafts").uncheck()
    instead.wait_for(state="visible")
    assert not draft.is_visible() and mark.is_visible()
    page.get_by_label("Drafts").check()
    draft.wait_for(state="visible")
    token = page.locator("article >> nth=0 >> .reply >> span[title^='[RESET]']").first
    # So unlikely is [RESET] in a random model that no token has a bar of its own.
    bar = "it => { it.style.setProperty('--bar', 0.5); return getComputedStyle(it).backgroundImage; }"
    assert "gradient" in token.evaluate(bar)
    page.get_by_label("Probability of [RESET]").uncheck()
    page.locator(".chance").wait_for(state="hidden")
    assert token.evaluate(bar) == "none"

    page.get_by_label("First words of the reply").fill(ATTACK)
    page.get_by_label("Message").fill(ATTACK)
    page.get_by_label("Message").press("Enter")
    page.locator("section >> nth=1 >> .note").nth(1).wait_for()
    assert page.locator(".asked").nth(1).inner_text() == ATTACK
    assert ATTACK in page.locator("article >> nth=3 >> .reply").inner_text()
    assert page.evaluate("[typeof hacked, document.querySelectorAll('#conversation img').length]") == ["undefined", 0]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing overflows a narrow screen
    page.get_by_role("button", name="New conversation").click()
    page.locator(".asked").first.wait_for(state="detached")
    assert all(url.startswith((served, "data:", "blob:")) for url in asked)
    page.close()
