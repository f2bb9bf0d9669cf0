"""What people see while something runs: how far it is, and how long it will take."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def _output() -> Console:
    in_notebook = "ipykernel" in sys.modules  # a kernel says of its output that it is a terminal, but has no width
    # Where the output goes to a file, tables need not fit a narrow screen.
    width = None if (sys.stdout.isatty() and not in_notebook) or "COLUMNS" in os.environ else 100
    if in_notebook and importlib.util.find_spec("ipywidgets") is None:
        # In a notebook bars grow by widgets. Without those every picture of a bar would be a line: what is shown is its
        # end.
        return Console(width=width, force_jupyter=False, force_terminal=False)
    return Console(width=width)


console = _output()


def bold(text: object) -> str:
    """Returns the markup of a text in bold, whatever brackets it holds, as a path may."""
    return f"[bold]{escape(str(text))}[/]"


def warn(text: str) -> None:
    """Says on the console what was chosen or left out, where that is no error."""
    console.print(f"note: {text}", style="yellow", highlight=False, markup=False)


@contextlib.contextmanager
def progress_bar(
    description: str, total: int, done: int = 0, first: str = "compiling"
) -> Iterator[Callable[..., None]]:
    """Shows a bar; yields `advance(count=1, note="")`, where the note stands behind the bar.

    first: what stands there until the first advance. That is what takes the time before it, of a program that runs for
           the first time
    """
    with _bar(MofNCompleteColumn(), TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task(description, total=total, completed=done, note=first)
        shown = first

        def advance(count: int = 1, note: str | None = None) -> None:
            nonlocal shown
            shown = note if note is not None else "" if count and shown == first else shown
            bar.update(task, advance=count, note=shown)

        yield advance


@contextlib.contextmanager
def share_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar in per cent; yields `advance(count, total)`, for work whose size is known once it has begun."""
    with _bar(TaskProgressColumn()) as bar:
        task = bar.add_task(description, total=None)
        yield lambda count, total: bar.update(task, advance=count, total=total)


class _Bars(Progress):
    """Draws bars once more when they end: in a notebook rich leaves them as the last of its ticks found them."""

    def stop(self) -> None:
        self.refresh()
        super().stop()


def _bar(how_far: ProgressColumn, *behind: ProgressColumn) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        how_far,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *behind,
    )
    return _Bars(*columns, console=console, refresh_per_second=4)
