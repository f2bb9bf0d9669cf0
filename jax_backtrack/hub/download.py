"""Fetches a model's folder from the Hugging Face Hub, or finds it in the cache that an earlier fetch left."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from jax_backtrack.errors import InputError

# What is read: never pickled weights, and not the copies of other formats that some models keep in `original/`.
_FILES = ["*.json", "*.safetensors", "*.jinja"]
_NOT = ["original/*"]


def download(path: str, revision: str | None = None, token: str | None = None, *, weights: bool = True) -> Path:
    """Downloads a Hub id (owner/name) at a branch, tag or commit, without weights if they are not wanted.

    `token` is that of a user who may read it; by default the one of `hf auth login` or of the variable HF_TOKEN. With
    the variable HF_HUB_OFFLINE=1, or where the Hub cannot be reached, the cache is taken as it is.
    """
    with _said_clearly(path, revision):
        folder = huggingface_hub.snapshot_download(
            path,
            revision=revision,
            token=token,
            allow_patterns=_FILES,
            ignore_patterns=_NOT if weights else [*_NOT, "*.safetensors"],
        )
    return Path(folder)


def download_file(path: str, file: str, revision: str | None = None, token: str | None = None) -> Path:
    """Downloads one file of a Hub id, as `download` does the folder."""
    with _said_clearly(path, revision):
        return Path(huggingface_hub.hf_hub_download(path, file, revision=revision, token=token))


@contextlib.contextmanager
def _said_clearly(path: str, revision: str | None) -> Iterator[None]:
    """Raises InputError, saying what would help, for whatever the Hub's client raises."""
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise InputError(f"{path}: no such file or folder, and not a Hub id (owner/name)")
    named = path if revision is None else f"{path} at revision {revision!r}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"{named}: the Hub asks for consent. Accept the licence on https://huggingface.co/{path}, then log in with "
            "'hf auth login' or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{named}: the Hub has the model, but not this revision") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{named}: no such folder here, and no such model on the Hub, or none for you to see"
        ) from error
    except Exception as error:  # the Hub's client raises those of its HTTP library too
        raise InputError(f"{named}: no such folder here, and the Hub does not give it: {error}") from error
