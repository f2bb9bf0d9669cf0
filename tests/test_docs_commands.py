"""The documents' commands and Python blocks are run, file by file and in their order, on tiny random models.

What cannot run here is in `NOT_RUN`, with the reason; of such commands the flags are parsed, by the program that takes
them, and the recipes checked.
"""

import argparse
import contextlib
import csv
import gzip
import io
import json
import os
import re
import runpy
import shutil
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import transformers
from absl import flags
from absl.testing import flagsaver

import jax_backtrack.main
from configs import base
from jax_backtrack import cli
from jax_backtrack.aot import tpu_specs
from jax_backtrack.data import testbed
from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.models import families
from jax_backtrack.models.families import gemma2, llama
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.training.settings import check_step
from jax_backtrack.utils.settings import check_recipe
from tests import markdown, tiny
from tests.markdown import FILES, Block, Command, named
from tests.processes import HANG, ROOT

# Beginnings of commands, and why they are not run.
NOT_RUN = {
    "make ": "installs from the network, and takes minutes; CI runs `make test`, `make lint` and `make oldest`",
    "pip install ": "installs from the network; tests/test_installed.py installs this package",
    "python3.11 -m venv ": "is followed by an installation from the network",
    "gcloud ": "rents machines",
    "hf auth login": "asks for a password",
    "python -m benchmarks.": "takes minutes to hours",
    "python benchmarks/loading.py": "takes minutes",
    "python -m jax_backtrack.integrations.lm_eval ": "optional; tests/integrations/test_lm_eval.py runs this",
    "jax-backtrack ... --config.wandb.project=": "optional; tests/training/test_wandb.py runs it where it is installed",
    "python main.py --config=... ": "is for several hosts; tests/distributed/test_hosts.py runs two processes",
    "python main.py --config=dpo_llama.py ": "8 billion parameters; tests/aot/test_compile.py compiles less",
    "python main.py --config=sft_gemma.py ": "its tokenizer alone takes long; the README's command with it is run",
    "python main.py --config=dpo_gemma.py ": "likewise, and plans compile 2 billion parameters for minutes",
    "python main.py --config=dpo_gemma_lora.py ": "compiles 2 billion parameters for minutes",
    "python main.py --config=replication/table.py ": "21 models; tests/experiments/test_replication.py trains fewer",
}

# What stands for what, in commands and in Python: models and data that are fetched, and sizes.
REPLACED = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": "base",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "base",
    "google/gemma-2-2b": "gemma",
    "mistralai/Mistral-7B-Instruct-v0.2": "tiny-mistral",  # which the document makes
    "meta-llama/Meta-Llama-Guard-2-8B": "base",
    "meta-llama/Llama-3.1-8B-Instruct": "base",
    "DATA/judge/llamaguard2-labels.jsonl.gz": "labels.jsonl.gz",
    ', revision="main"': "",  # a folder has none
    "Settings(steps=100)": "Settings(steps=1, width=4)",
    "max_new_tokens=256": "max_new_tokens=8",
    "max_new_tokens=64": "max_new_tokens=8",
}
DEFAULT = base.get_config().model.path  # of recipes that name no model; "base" stands for it too
SMALL = """
    --config.data.limit=6
    --config.train.steps=1 --config.train.batch_size=1 --config.train.max_seq_len=256
    --config.train.logits_chunk_size=64
    --config.train.checkpoint_every_steps=0
    --config.sample.max_new_tokens=4 --config.sample.max_num_seqs=2
    --config.evaluate.prompts=2 --config.evaluate.prefill=(2,) --config.evaluate.limit=2
    --config.judge.layers=1 --config.judge.tokens=16 --config.judge.folds=2
""".split()

# What a document takes for granted, run before its blocks.
BEFORE = {
    "docs/EVALUATION.md": """
        python main.py --config=sft_smollm.py --workdir=runs/baseline --mode=evaluate \
            --config.evaluate.harmful="('AdvBench=advbench.csv', 'SimpleSafetyTests=sst.csv')" \
            --config.evaluate.harmless="('XSTest=xstest.csv',)" --config.evaluate.judge=meta-llama/Meta-Llama-Guard-2-8B
    """,
}

_RECIPES = ROOT / "configs"
_TYPED = "questions.txt"  # what stands on standard input where the document does not say


def shown(file: Path) -> list[Block | Command]:
    """Python blocks and commands of a document, in their order."""
    found: list[Block | Command] = []
    for block in markdown.blocks(file):
        if block.language == "python":
            found.append(block)
        elif block.language != "text":
            found.extend(markdown.commands(block))
    return found


def named_in_text(file: Path) -> list[Command]:
    """Commands within lines, such as those of benchmarks beside their figures."""
    texts = [Block(line, "", text) for line, text in markdown.names(file) if text.startswith("python ") and "-" in text]
    return [command for block in texts for command in markdown.commands(block)]


def reason_not_to_run(command: Command) -> str | None:
    return next((entry for entry in NOT_RUN if f"{_plain(command)} ".startswith(entry)), None)


def _plain(command: Command) -> str:
    return " ".join(command.words)


EVERY = [(file, command) for file in FILES for command in [*shown(file), *named_in_text(file)]]
PARSED = [(file, command) for file, command in EVERY if isinstance(command, Command) and reason_not_to_run(command)]


# -------------------------------------------------------------------------------------- what documents find there


@pytest.fixture(scope="module")
def given(tmp_path_factory, short_tokenizer) -> Path:
    """A folder with the models and files that documents name."""
    folder = tmp_path_factory.mktemp("given")
    model = tiny.model(vocab_size=tiny.SHORT, max_position_embeddings=1024)
    save(model, short_tokenizer, folder / "base")
    with_reset = add_reset(model, short_tokenizer)
    with_reset.reset_mode = "rewind"
    for run in ("sft", "dpo", "baseline"):
        save(model, with_reset, folder / "runs" / run / "export")

    def write(name: str, rows) -> None:
        with (gzip.open if name.endswith(".gz") else open)(folder / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    questions = [question.preference() for question in testbed.questions("train", 12)]
    texts = [each.prompt[-1]["content"] for each in questions]
    pairs = [
        {"prompt": text, "chosen": each.chosen, "rejected": each.rejected}
        for text, each in zip(texts, questions, strict=True)
    ]
    write("my_pairs.jsonl", pairs)
    datasets.Dataset.from_list(pairs).to_parquet(folder / "my_pairs.parquet")
    labels = [(pair["prompt"], pair[side], side == "rejected") for pair in pairs for side in ("chosen", "rejected")]
    write("labels.jsonl.gz", [dict(zip(("prompt", "response", "unsafe"), each, strict=True)) for each in labels])
    for name in ("my_prompts.txt", "questions.txt"):
        (folder / name).write_text("\n".join(texts[:2]) + "\n")
    for name in ("advbench.csv", "sst.csv", "xstest.csv"):
        with open(folder / name, "w", newline="") as file:
            rows = csv.DictWriter(file, ["prompt", "target"])
            rows.writeheader()
            rows.writerows({"prompt": text, "target": "Here is what you asked for"} for text in texts[:3])
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, gemma2_folder) -> Path:
    """A tiny Gemma-2 with the real tokenizer, and, as the base model, without a chat template."""
    folder = tmp_path_factory.mktemp("gemma") / "gemma"
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(gemma2_folder)
    made = tiny.model(**tiny.GEMMA2 | dict(vocab_size=256000, hidden_size=16, max_position_embeddings=1024))
    save(made, ChatTokenizer(hf, chat_template="gemma2"), folder)
    (folder / "chat_template.jinja").unlink()
    return folder


# ------------------------------------------------------------------------------------------------------- running


class Runner:
    """Runs the blocks and commands of one document in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self._patch = folder, monkeypatch
        self._names = {"__name__": "document"}
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))

    def block(self, block: Block) -> str:
        """Writes a block that is a file; runs any other, behind those before it. Returns what it printed."""
        text = replaced(block.text)
        if block.file:
            (self.folder / block.file).write_text(text)
            sys.modules.pop(Path(block.file).stem, None)  # of another test
            return ""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, f"line {block.line}", "exec"), self._names)
        return printed.getvalue()

    def command(self, command: Command) -> None:
        """Runs a command within this process; it must end with exit code 0."""
        words = [replaced(word) for word in command.words]
        for name, value in command.environment:
            self._patch.setenv(name, value)
        with open(self.folder / (command.reads or _TYPED)) as given:
            self._patch.setattr(sys, "stdin", given)
            if words[0] == "jax-backtrack" or words[:2] == ["python", "main.py"]:
                self._main(words[1:] if words[0] == "jax-backtrack" else words[2:])
            elif words[0] == "python" and len(words) == 2:
                runpy.run_path(str(self.folder / words[1]), run_name="__main__")
            else:
                raise AssertionError(f"no way to run it is known: {command}")

    def _main(self, words: list[str]) -> None:
        said = dict(word.removeprefix("--").split("=", 1) for word in words)
        if "mode" not in said:  # else a model that is there already would be all
            shutil.rmtree(self.folder / said["workdir"], ignore_errors=True)
        with parsed([*words, *SMALL]) as (left, config):
            config.model.path = "base" if config.model.path == DEFAULT else replaced(config.model.path)
            served = said.get("mode") == "web"
            if served:
                config.web.port = 0  # any that is free
            with visited() if served else contextlib.nullcontext():
                with pytest.raises(SystemExit) as ended:
                    jax_backtrack.main.main(left)
                assert ended.value.code == 0, words


def replaced(text: str) -> str:
    for long, short in REPLACED.items():
        text = text.replace(long, short)
    return text


@contextlib.contextmanager
def parsed(words: list[str]):
    """Arguments of main.py as it parses them: what is left over, and the recipe."""
    argv = sys.argv
    sys.argv = ["main.py", *words]  # which ml_collections reads
    try:
        with flagsaver.flagsaver():
            left = cli.parse_flags(cli.with_config_path(sys.argv, _RECIPES))
            yield left, flags.FLAGS.config
    finally:
        sys.argv = argv


@contextlib.contextmanager
def visited() -> Iterator[None]:
    """Here a program serves a page, until a visitor has looked at it."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        visitor = Visitor(said)
        visitor.start()
        try:
            yield
        finally:
            visitor.leave()
    assert visitor.status == 200, "no page came"


class Visitor(threading.Thread):
    """Waits until a program says where its page is, keeps its status, and then ends the program as Ctrl-C does."""

    def __init__(self, said: io.StringIO):
        super().__init__(daemon=True)
        self.status, self._said, self._left = None, said, threading.Event()

    def run(self):
        while not (page := re.search(r"^page: (\S+)\n", self._said.getvalue(), re.MULTILINE)):
            if self._left.wait(0.1):
                return
        try:
            with urllib.request.urlopen(page[1], timeout=HANG) as answer:
                self.status = answer.status
        finally:
            if not self._left.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    def leave(self) -> None:
        """The program has ended, by itself or by this."""
        self._left.set()
        self.join()


@pytest.mark.parametrize("file", [file for file in FILES if shown(file)], ids=named)
def test_what_a_document_shows_works(file, given, tmp_path, monkeypatch, request):
    folder = shutil.copytree(given, tmp_path / "here")
    runner = Runner(folder, monkeypatch)
    request.addfinalizer(close_pages)
    for command in markdown.commands(Block(0, "", BEFORE.get(named(file), ""))):
        runner.command(command)
    for each in shown(file):
        if "gemma" in str(each) and not (folder / "gemma").exists():
            (folder / "gemma").symlink_to(request.getfixturevalue("gemma"))
        if isinstance(each, Block):
            assert_output(file, each, runner.block(each))
        elif not reason_not_to_run(each):
            runner.command(each)


def close_pages() -> None:
    """Ends what a document serves in the background."""
    if "gradio" in sys.modules:
        sys.modules["gradio"].close_all(verbose=False)


def assert_output(file: Path, block: Block, printed: str) -> None:
    """Where a block of text follows a Python block, it is its output."""
    blocks = markdown.blocks(file)
    behind = blocks[blocks.index(block) + 1 :][:1]
    if behind and behind[0].language == "text":
        assert printed.strip() == behind[0].text.strip(), f"{named(file)}, line {block.line}"


# ------------------------------------------------------------------------------------------------- what is not run


class Parsed(Exception):
    """A program's own parser has taken the arguments."""


@pytest.mark.parametrize(("file", "command"), PARSED, ids=lambda each: str(each) if isinstance(each, Command) else "")
def test_what_is_not_run_can_be_meant(file, command, monkeypatch):
    words = list(command.words)
    if words[:2] == ["python", "main.py"]:
        check_main([word for word in words[2:] if "..." not in word], whole="--config=..." not in words)
    elif words[0] == "jax-backtrack":
        check_main([word for word in words[1:] if "..." not in word], whole=False)
    elif words[0] == "python" and "benchmarks" in words[1 + (words[1] == "-m")]:
        check_benchmark([word for word in words[1:] if "..." not in word], monkeypatch)
    elif words[0] == "pip" and "-r" in words:
        assert (ROOT / words[words.index("-r") + 1]).is_file()
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        assert all(f"{word.partition('=')[0]} ?=" in (ROOT / "Makefile").read_text() for word in words[2:])


def check_main(words: list[str], whole: bool) -> None:
    """Parses the flags, and checks the recipe as the command would. Of one that is not whole, flags alone."""
    words = words if whole else ["--config=sft_smollm.py", *words]
    with parsed(words) as (left, config):
        assert len(left) == 1, f"not a flag: {left[1:]}"
        mode = flags.FLAGS.mode
        assert mode in cli.MODES
        if mode == "run-stages":
            check_recipe(config)
        else:
            check_step(config)
        for topology in flags.FLAGS.topology:
            tpu_specs.chip(topology)


def check_benchmark(words: list[str], monkeypatch) -> None:
    """Runs the benchmark's module as far as to where its parser has taken the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, *arguments):
        raise Parsed(parse(parser, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    is_module = words[0] == "-m"
    name, arguments = words[is_module], words[is_module + 1 :]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(name, run_name="__main__") if is_module else runpy.run_path(ROOT / name, run_name="__main__")


def test_no_reason_is_left_over():
    """Every entry of the tables is of a command, or of a text, that a document has."""
    assert {reason_not_to_run(command) for _, command in PARSED} == set(NOT_RUN)
    texts = "".join(file.read_text() for file in FILES)
    assert [text for text in REPLACED if text not in texts] == []
    assert BEFORE.keys() <= {named(file) for file in FILES}
    assert all(reason_not_to_run(command) for file in FILES for command in named_in_text(file))


def test_the_check_of_a_family_fails_where_the_family_is_wrong(given, tmp_path, monkeypatch):
    """The example of docs/FAMILIES.md, once with its sliding window left out."""
    folder = shutil.copytree(given, tmp_path / "here")
    runner = Runner(folder, monkeypatch)
    for block in markdown.blocks(ROOT / "docs" / "FAMILIES.md"):
        if block.file:
            runner.block(block)
    family = folder / "mistral_family.py"
    right = family.read_text()
    family.write_text(right.replace("windows=(window,)", "windows=(None,)"))
    assert family.read_text() != right
    with pytest.raises(AssertionError, match="loaded: "):
        runner.command(Command(0, ("python", "check_mistral.py")))


def test_a_family_without_all_its_names_is_refused():
    with pytest.raises(
        InputError, match=r"the family 'mine' has no WEIGHT_NAMES, from_hf_config, to_hf_config in json"
    ):
        families.register("mine", json)
    with pytest.raises(InputError, match=r"'llama' is in jax_backtrack\.models\.families\.llama already"):
        families.register("llama", gemma2)
    families.register("llama", llama)


def test_the_given_models_are_what_they_stand_for(given):
    _, tokenizer = load(given / "runs" / "sft")
    assert tokenizer.reset_id is not None and tokenizer.reset_mode == "rewind"
    assert load(given / "base")[1].reset_id is None
