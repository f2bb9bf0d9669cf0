"""A conversation in the terminal, where drafts are struck through as they are taken back."""

import sys
from collections.abc import Iterable, Iterator

from rich.live import Live
from rich.text import Text

from jax_backtrack.errors import InputError
from jax_backtrack.progress import console
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.stream import Done, Retract, Token

ANEW = "/new"
RESET_MARK = Text(" [RESET] ", style="bold yellow")


def chat(sampler: Sampler, lines: Iterable[str], *, seed: int = 0, hold_back: int = 0) -> None:
    """Answers line after line until they end; `/new` begins another conversation. Drafts do not stand in it."""
    console.print(f"{ANEW} begins another conversation, Ctrl-D ends", style="dim", highlight=False)
    messages = []
    for number, line in enumerate(lines):
        if line == ANEW:
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        try:
            reply = _answer(sampler, messages, seed + number, hold_back)
        except InputError as error:
            console.print(f"error: {error}", style="bold red", highlight=False, markup=False)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": reply.text})


def typed_lines() -> Iterator[str]:
    """Lines from standard input that are not empty, with a prompt where somebody types them."""
    while True:
        try:
            line = console.input("[bold]you[/]  ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"standard input cannot be read: {error}") from None
        if line.strip():
            yield line.strip()


def _answer(sampler: Sampler, messages, seed: int, hold_back: int):
    withdrawn, shown = Text(), ""
    with Live(console=console, refresh_per_second=12) as live:
        for event in sampler.stream(messages, seed=seed, hold_back=hold_back):
            match event:
                case Token(text):
                    shown += text
                case Retract(draft):
                    withdrawn += struck(draft) if draft else RESET_MARK
                    shown = ""
                case Done(reply):
                    shown = reply.text
            live.update(withdrawn + Text(shown, style="green"))
    if not console.is_terminal:
        console.print()  # there a Live ends without a line break
    return reply


def struck(draft: str) -> Text:
    """A draft struck through, `~~so~~` in a file, and [RESET] behind it."""
    marked = draft if console.is_terminal else f"~~{draft}~~"
    return Text(marked, style="strike red") + RESET_MARK
