"""Packs trees into rows, and serves batches of rows by number: deterministic and resumable."""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jax_backtrack.backtracking.trees import (
    Example,
    TreeSpec,
    build_tree,
    common_beginning,
    draw_cuts,
    pack,
    tree_length,
)
from jax_backtrack.data.examples import cuts_generator

# Rows that stand open while packing.
_OPEN_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Pack:
    """Numbers of the trees in a row, those that begin alike next to each other, and how many tokens they make."""

    members: list[int]
    tokens: int


def best_fit_pack(prompts: Sequence[np.ndarray], lengths: Sequence[int], max_seq_len: int) -> Iterator[Pack]:
    """Packs by best fit with a bounded number of open rows, for trees of these prompts and lengths.

    The trees come in order. Each goes into the open row that it leaves the least room in, where it counts without the
    beginning that its prompt shares with one of the row's, which `pack` lays once. Where no open row has room, the
    fullest one is closed.
    """
    rows: list[Pack] = []
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        fitting = []
        for number, row in enumerate(rows):
            if row.tokens + length - len(prompt) <= max_seq_len:  # worth a look at the prompts
                shared = max(common_beginning(prompt, prompts[member]) for member in row.members)
                if (tokens := row.tokens + length - shared) <= max_seq_len:
                    fitting.append((tokens, -number))
        if fitting:
            tokens, number = max(fitting)
            rows[-number] = Pack([*rows[-number].members, index], tokens)
            continue
        if len(rows) == _OPEN_ROWS:
            fullest = max(range(len(rows)), key=lambda number: rows[number].tokens)
            yield _in_order(rows.pop(fullest), prompts)
        rows.append(Pack([index], length))
    yield from (_in_order(row, prompts) for row in rows)


def _in_order(row: Pack, prompts: Sequence[np.ndarray]) -> Pack:
    return dataclasses.replace(row, members=sorted(row.members, key=lambda index: prompts[index].tolist()))


@dataclasses.dataclass(frozen=True)
class TreeSource:
    """Builds the tree of any example of any epoch. In DPO the cuts of an example are the same in every epoch, so that
    what the reference gives it is too; in SFT every epoch draws new drafts."""

    examples: Sequence[Example]
    spec: TreeSpec
    seed: int

    def cuts(self, epoch: int, index: int):
        """Returns where the example's replies are cut in this epoch."""
        drawn_in = 0 if self.spec.objective == "dpo" else epoch
        return draw_cuts(self.examples[index], cuts_generator(self.seed, drawn_in, index))

    def length(self, epoch: int, index: int) -> int:
        """Tokens of the example's tree in this epoch."""
        return tree_length(self.examples[index], self.spec, self.cuts(epoch, index))

    def tree(self, epoch: int, index: int):
        """Returns the example's tree in this epoch."""
        return build_tree(self.examples[index], self.spec, self.cuts(epoch, index))

    def best_fit_pack(self, epoch: int, indices: Sequence[int], max_seq_len: int) -> Iterator[Pack]:
        """Yields `best_fit_pack` for the trees of these examples in this epoch; members are the examples' numbers."""
        prompts = [self.examples[index].prompt for index in indices]
        lengths = [self.length(epoch, index) for index in indices]
        for row in best_fit_pack(prompts, lengths, max_seq_len):
            yield dataclasses.replace(row, members=[indices[number] for number in row.members])


class PackedRows:
    """Rows of packed trees by number, over as many epochs as `count` rows need. Every epoch is shuffled anew.

    For DPO `reference`, float32 `[examples, 2, 2]`, must be set before the first row is taken: of each example's pairs
    what the frozen reference gives the chosen and the rejected side.
    """

    reference: np.ndarray | None = None

    def __init__(self, source: TreeSource, max_seq_len: int, count: int):
        self._source, self._max_seq_len = source, max_seq_len
        self._rows: list[tuple[int, Pack]] = []
        epoch = 0
        while len(self._rows) < count:
            order = np.random.default_rng([source.seed, epoch]).permutation(len(source.examples)).tolist()
            self._rows += [(epoch, row) for row in source.best_fit_pack(epoch, order, max_seq_len)]
            epoch += 1
        del self._rows[count:]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict:
        epoch, row = self._rows[number]
        trees = [self._source.tree(epoch, index) for index in row.members]
        reference_Sx2 = np.zeros((self._max_seq_len, 2), np.float32)
        if self.reference is not None:
            logps = self.reference[row.members, : self._source.spec.pairs].reshape(-1, 2)
            reference_Sx2[: len(logps)] = logps
        return {"rows": pack(trees, self._max_seq_len), "reference": reference_Sx2}

    def members(self, number: int) -> list[int]:
        """Numbers of the examples in a row."""
        return self._rows[number][1].members

    def examples(self) -> list[int]:
        """Numbers of all examples that stand in any row, in order."""
        return sorted({index for _, row in self._rows for index in row.members})

    def padding(self) -> float:
        """Returns the share of the rows' tokens that is padding."""
        return 1 - sum(row.tokens for _, row in self._rows) / (len(self._rows) * self._max_seq_len)

    def origins(self, number: int) -> list[str]:
        """Returns where the examples in a row came from."""
        return [self._source.examples[index].origin for index in self.members(number)]


def batches(rows: PackedRows, batch_size: int, local: Sequence[int] | None = None) -> grain.DatasetIterator:
    """Batches of rows, prefetched; the iterator's `get_state` and `set_state` give and take the data position.

    local: the rows of each batch that are wanted, numbered within it; all if None. The data position counts whole
    batches, so it is the same whoever takes which of their rows.
    """
    local = range(batch_size) if local is None else local
    dataset = grain.MapDataset.source(_LocalRows(rows, batch_size, local)).batch(len(local))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


@dataclasses.dataclass(frozen=True)
class _LocalRows:
    """Of every batch the wanted rows, one batch behind the other."""

    rows: PackedRows
    batch_size: int
    local: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * len(self.local)

    def __getitem__(self, number: int) -> dict:
        batch, place = divmod(number, len(self.local))
        return self.rows[batch * self.batch_size + self.local[place]]
