"""A conversation in the terminal, where drafts are struck through as they are taken back."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from jax_backtrack.errors import InputError
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.seeds import reply_seed
from jax_backtrack.sampling.streams import Finished, Retraction, TextDelta
from jax_backtrack.tokenizer.chat_tokenizer import Message
from jax_backtrack.utils.console import console
from jax_backtrack.utils.drafts import RESET_MARK, readable, struck

ANEW = "/new"
_HINT = f"{ANEW} begins another conversation; Ctrl-C ends a reply, Ctrl-D the chat"
_PROMPT = "you  "


def chat(sampler: Sampler, lines: Iterable[str]) -> None:
    """Answers line after line until they end; `/new` begins another conversation. Drafts do not stand in it.

    Ctrl-C ends a reply, which with its question leaves the conversation, and between replies the chat. Where nobody
    types, it is raised: the lines that are still to come are not wanted either.
    """
    if sys.stdin.isatty():
        _say(_HINT)
    if sampler.tokenizer.reset_id is None:
        _say("this model has no [RESET]: it takes nothing back")
    messages: list[Message] = []
    numbered = enumerate(lines)
    while True:
        try:
            number, line = next(numbered)
        except StopIteration:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            console.print()
            _say("ended")
            return
        if line == ANEW:
            messages = []
            continue
        conversation = [*messages, {"role": "user", "content": line}]
        try:
            reply = _answer(sampler, conversation, reply_seed(sampler.params.seed, number))
        except InputError as error:
            console.print(f"error: {error}", style="bold red", highlight=False, markup=False)
            if messages:
                _say(f"{ANEW} begins another conversation, without what was said so far")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            _say("stopped: the model does not see this question again; Ctrl-C once more ends the chat")
        else:
            messages = [*conversation, {"role": "assistant", "content": reply.text}]


def typed_lines() -> Iterator[str]:
    """Lines from standard input that are not empty, with a prompt and line editing where somebody types them."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines, and has those before on the arrow keys
    while True:
        try:
            line = input(_PROMPT if typed else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error}") from None
        if line.strip():
            yield line.strip()


def _answer(sampler: Sampler, messages: Sequence[Message], seed: int) -> Reply:
    withdrawn, shown, reply = Text(), "", None
    # A terminal sees the reply grow; a file or another program gets it whole, in lines that nothing has broken.
    growing = _Growing() if console.is_terminal and not console.is_dumb_terminal else contextlib.nullcontext()
    with contextlib.closing(sampler.stream(messages, seed=seed)) as events, growing:
        for event in events:
            match event:
                case TextDelta(text):
                    shown += text
                case Retraction(draft):
                    withdrawn += struck(draft) if draft else RESET_MARK
                    shown = ""
                case Finished(reply):
                    shown = reply.text
            if isinstance(growing, _Growing):
                growing.show(withdrawn + Text(readable(shown), style="green"))
    if not isinstance(growing, _Growing):
        console.print(withdrawn + Text(readable(shown), style="green"), soft_wrap=True)
    return reply


class _Growing:
    """A text that grows in the terminal. While it does, of one that is longer than the screen the end is seen."""

    def __init__(self):
        self._text = Text("…", style="dim")
        self._live = Live(get_renderable=lambda: self, console=console, refresh_per_second=12)

    def show(self, text: Text) -> None:
        self._text = text

    def __enter__(self) -> "_Growing":
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()  # which draws once more, without a limit to the height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._text, options, pad=False)
        if self._live.is_started:
            lines = lines[-max(1, console.height - 1) :]
        for line in lines:
            yield from line
            yield Segment.line()


def _say(text: str) -> None:
    console.print(text, style="dim", highlight=False, markup=False)
