"""Tables in a terminal, which is often 80 columns wide: figures must not be cut off there."""

from collections.abc import Iterable

from rich import box
from rich.measure import Measurement
from rich.table import Table

from jax_backtrack.utils.console import console


def new_table(title: str) -> Table:
    """Returns a table without columns, with as little between them as can be read."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def add_names(table: Table, heading: str, names: Iterable[str]) -> None:
    """Adds a column of names, which are folded where the table would be too wide, but only between words."""
    table.add_column(heading, min_width=max(len(word) for name in (heading, *names) for word in name.split()))


def add_figures(table: Table, heading: str) -> None:
    """Adds a column of figures, which are never folded, under a heading with one word on each line."""
    table.add_column("\n".join(heading.split()), justify="right", no_wrap=True)


def fits(table: Table) -> bool:
    """Tells whether the terminal is wide enough to show it whole."""
    return Measurement.get(console, console.options.update(max_width=10**6), table).minimum <= console.width
