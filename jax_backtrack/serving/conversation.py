"""A conversation with one model or several side by side, as it is written: for whoever draws it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

from jax_backtrack.errors import InputError
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.streams import Event, Finished, Retraction, TextDelta, TokenText
from jax_backtrack.tokenizer.chat_tokenizer import Message

_PAUSE = 0.08  # seconds between two pictures of a reply that is being written


@dataclasses.dataclass(frozen=True)
class Draft:
    """What was shown of a draft that was taken back, and the log-probability of the [RESET] that took it back."""

    pieces: tuple[TokenText, ...]
    reset_logprob: float | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one model has made of a message so far.

    drafts:  those that it took back
    pieces:  what is shown since
    reply:   the whole, once it is finished
    error:   why there is none
    stopped: whether somebody ended it
    """

    drafts: tuple[Draft, ...] = ()
    pieces: tuple[TokenText, ...] = ()
    reply: Reply | None = None
    error: str = ""
    stopped: bool = False

    @property
    def ended(self) -> bool:
        return self.reply is not None or self.stopped or bool(self.error)

    def after(self, event: Event) -> "Answer":
        """Returns the answer after one more event of its stream."""
        match event:
            case TextDelta(pieces=pieces):
                return dataclasses.replace(self, pieces=self.pieces + pieces)
            case Retraction(reset_logprob=chance):
                return dataclasses.replace(self, drafts=(*self.drafts, Draft(self.pieces, chance)), pieces=())
            case Finished(reply):
                return dataclasses.replace(self, reply=reply)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a user said, with an answer of each model."""

    message: str
    answers: tuple[Answer, ...]

    @property
    def ended(self) -> bool:
        return all(answer.ended for answer in self.answers)

    def stop(self) -> "Turn":
        """Returns the turn without more of the answers that have not ended."""
        stopped = (answer if answer.ended else dataclasses.replace(answer, stopped=True) for answer in self.answers)
        return dataclasses.replace(self, answers=tuple(stopped))


def messages(turns: Sequence[Turn], model: int, message: str, system: str = "") -> list[Message]:
    """Returns the conversation as the model of this number is to see it: replies that were finished, and no drafts;
    under a system message where there is one."""
    conversation: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if reply := turn.answers[model].reply:
            conversation += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": reply.text}]
    return [*conversation, {"role": "user", "content": message}]


def answers(
    samplers: Sequence[Sampler],
    turns: Sequence[Turn],
    message: str,
    *,
    prefill: str,
    seed: int,
    hold_back: int,
    system: str = "",
) -> Iterator[Turn]:
    """Yields the next turn as it grows: after each event of one model, which take turns token by token.

    prefill: how the replies begin, written for the models
    system: a system message over the conversation; "" for none
    A model that cannot answer, as where the conversation exceeds its positions, says so in its `Answer.error`.
    """
    grown = [Answer() for _ in samplers]
    yield Turn(message, tuple(grown))
    with contextlib.ExitStack() as open_streams:
        streams: dict[int, Iterator[Event]] = {}
        for number, sampler in enumerate(samplers):
            try:
                conversation = messages(turns, number, message, system)
                stream = sampler.stream(conversation, prefill=prefill, seed=seed, hold_back=hold_back)
            except InputError as error:
                grown[number] = Answer(error=str(error))
            else:
                streams[number] = open_streams.enter_context(contextlib.closing(stream))
        while streams:
            for number, stream in list(streams.items()):
                event = next(stream)
                grown[number] = grown[number].after(event)
                if isinstance(event, Finished):
                    del streams[number]
                yield Turn(message, tuple(grown))
    yield Turn(message, tuple(grown))


def worth_drawing(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Of a turn as it grows the first state and the last, and between them no more than an eye can follow."""
    shown = -_PAUSE
    for turn in turns:
        now = time.monotonic()
        if turn.ended or now - shown > _PAUSE:
            shown = now
            yield turn
