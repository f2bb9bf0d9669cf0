"""What a long run has finished, kept on disk piece by piece, so that the same command goes on where it was stopped."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from jax_backtrack.utils.console import console
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.workdir import atomic_write


class ResumeCache:
    """A file of JSON lines, each a result under a key that tells all that it depends on (`key_of`).

    A line outlasts a power cut before the next one is computed. The last line of a killed process may be cut short; it
    counts as not there.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, None
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known = dict(filter(None, map(_entry, lines)))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> object | None:
        """Returns the result under this key, if it is there."""
        return self._known.get(key)

    def add(self, key: str, result: object) -> None:
        """Keeps a result, which JSON can hold."""
        if self._file is None:
            atomic_write(self._path, "".join(_line(*entry) for entry in self._known.items()))
            self._file = self._path.open("a", encoding="utf-8")
        self._known[key] = result
        self._file.write(_line(key, result))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, which stays."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Closes the file and deletes it."""
        self.close()
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def resume_cache_of(result: Path) -> Iterator[ResumeCache]:
    """Returns the resume cache of work that ends in the file `result`; it lies beside it, and goes when the work is
    done."""
    resume_cache = ResumeCache(result.with_name(f"{result.name}.partial"))
    if resume_cache:
        console.print(
            f"{result} was begun before: {len(resume_cache)} parts of it are taken from there", highlight=False
        )
    try:
        yield resume_cache
    except BaseException:
        resume_cache.close()
        raise
    resume_cache.remove()


def key_of(*facts) -> str:
    """Returns a hash of values that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _line(key: str, result: object) -> str:
    return to_json({"key": key, "result": result}, ensure_ascii=True) + "\n"


def _entry(line: str) -> tuple[str, object] | None:
    try:
        entry = json.loads(line)
        return entry["key"], entry["result"]
    except (ValueError, KeyError, TypeError):
        return None
