"""`jax_backtrack` as a model of lm-evaluation-harness: general ability of a model that may take its drafts back."""

import dataclasses
import json
import logging

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jax_backtrack.distributed.mesh import make_mesh, platform, row_parts
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.load import load
from jax_backtrack.integrations.lm_eval.likelihood import log_likelihoods
from jax_backtrack.integrations.lm_eval.marked import MarkedText, escape
from jax_backtrack.models.transformer import Compute
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.seeds import reply_seeds
from jax_backtrack.sampling.settings import OPTIONAL, STATIC, SamplingParams
from jax_backtrack.utils.console import console, progress_bar

_log = logging.getLogger(__name__)
_ROWS = 16  # of a batch whose size is "auto"
# What a task may ask for beside `until`, `max_gen_toks`, `do_sample` and `temperature`: as the sampler has it.
_SAMPLED = [each.short_name for each in SamplingParams.settings if each.in_loop in (STATIC, OPTIONAL)]


@register_model("jax_backtrack")
class JaxBacktrackLM(TemplateLM):
    """A model of ours, with resets, for the harness's tasks.

    path:          as of `jax_backtrack.load`: a workdir, a Hugging Face folder, a `.gguf` file or a Hub id
    reset_mode:    as of `jax_backtrack.Sampler`
    sampling:      fields of `jax_backtrack.SamplingParams`, such as max_resets and reset_bias; a task's own come first
    batch_size:    prompts in flight at once, and rows of token trees that are scored at once; "auto": 16
    max_seq_len:    tokens of a row that is scored; one request may need more
    max_length:    positions that are used; None for all that the model has
    max_gen_toks:  of a reply, for tasks that do not say
    chat_template, revision, dtype: as of `jax_backtrack.load`
    data, fsdp, tensor: sizes of the mesh of devices, as `mesh.*` of a recipe
    seed:          that those of replies are derived from, for tasks that sample
    device:        the harness's, and it names one for torch unasked: not used, JAX takes all devices that it sees

    A reply is what the user sees: the text after the last reset. Log-likelihoods are those of given texts: there is
    nothing to take back. Text of a task never becomes a control token; in conversations the template's own do.
    """

    def __init__(
        self,
        path: str,
        *,
        reset_mode: str | None = None,
        batch_size: int | str = 1,
        max_seq_len: int = 1024,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        chat_template: str = "",
        revision: str | None = None,
        dtype: str = "float32",
        data: int = -1,
        fsdp: int = 1,
        tensor: int = 1,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **sampling,
    ):
        super().__init__()
        mesh = make_mesh(data, fsdp, tensor)
        self._model, self._tokenizer = load(
            path,
            mesh,
            dtype,
            compute=Compute.suited_to(platform(mesh), dtype=dtype),
            chat_template=chat_template,
            revision=revision,
        )
        self._marked = MarkedText(self._tokenizer)
        self._reset_mode, self._params = reset_mode, SamplingParams(**sampling)
        self._samplers: dict[str, Sampler] = {}
        self._seed, self._max_seq_len, self._max_gen_toks = seed, max_seq_len, max_gen_toks
        parts = row_parts(self._model.compute.mesh)
        self.batch_size = -(-_rows(batch_size, max_batch_size) // parts) * parts
        positions = self._model.config.max_position_embeddings
        self.max_length = positions if max_length is None else max_length
        if not 1 <= self.max_length <= positions:
            raise InputError(f"max_length is {max_length}; the model has {positions} positions")
        # What the tokenizer puts in front of a plain text, such as Llama-3's <|begin_of_text|>.
        self._beginning = list(self.tokenizer("").input_ids)
        self._conversations = False

    # ---------------------------------------------------------------------------------------------- text to ids

    @property
    def tokenizer(self):
        """The Hugging Face tokenizer, which the harness asks for the chat template."""
        return self._tokenizer.hf

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests. It asks only where there are conversations."""
        self._conversations = True
        return f"jax_backtrack-{self.tokenizer.name_or_path.replace('/', '__')}"

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of what stands before a text that has no context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the conversation as a marked string (`marked.py`), to where the assistant speaks; without
        `add_generation_prompt` its last message is how the assistant's reply begins."""
        self._conversations = True
        messages, begun = list(chat_history), ""
        if not add_generation_prompt:
            begun = messages.pop()["content"]
        try:
            return self._marked.write(messages, begun)
        except InputError as error:
            without_system = [message for message in messages if message["role"] != "system"]
            if len(without_system) == len(messages):
                raise
            _log.warning("%s. What the system was to be told is left out", error)
            return self._marked.write(without_system, begun)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a context, or with `add_special_tokens` False of a text as it stands."""
        if add_special_tokens is False:
            return self._tokenizer.encode(string).tolist()
        if self._is_conversation(string):
            return self._marked.read(string)
        return self._beginning + self._tokenizer.encode(string).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return super()._encode_pair(context, escape(continuation) if self._is_conversation(context) else continuation)

    def _is_conversation(self, context: str) -> bool:
        """Tells whether a context is a conversation; none is before the harness has asked for a chat template."""
        return self._conversations and self._marked.is_written(context)

    # --------------------------------------------------------------------------------------------------- scores

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        pairs, cut = [], 0
        for texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                shown = "" if texts is None else f": {texts[1]!r:.60}"
                raise InputError(f"a continuation has {len(continuation)} tokens, more than {self.max_length}{shown}")
            # The last token is only asked for, so there may be one more than positions.
            shortened = context[-(self.max_length + 1 - len(continuation)) :]
            cut += len(shortened) < len(context)
            pairs.append((shortened, continuation))
        self._say_cut(cut, len(pairs))
        with progress_bar("log-likelihoods", len(pairs)) as advance:
            likelihoods = log_likelihoods(
                self._model, pairs, max_seq_len=self._max_seq_len, batch_size=self.batch_size, progress=advance
            )
        for (texts, *_rest), result in zip(requests, likelihoods, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return likelihoods

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns `log p(text)` of whole texts, in nats, by windows where one is longer than the model's positions."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self._beginning + self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += log_p
        for request, log_p in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_p)
        return sums

    # -------------------------------------------------------------------------------------------------- replies

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Replies as the user sees them, which end before the first of the task's stop strings."""
        replies, resets = [""] * len(requests), 0
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        seed_N = reply_seeds(self._seed, len(requests))
        with progress_bar("replies", len(requests)) as advance:
            for numbers in alike.values():
                sampler, room = self._sampler(requests[numbers[0]].args[1])
                prompts, cut = [], 0
                for number in numbers:
                    ids = self.tok_encode(requests[number].args[0]) or [self.prefix_token_id]
                    cut += len(ids) > room
                    prompts.append(np.asarray(ids[-room:], np.int32))
                self._say_cut(cut, len(prompts))
                seeds = [seed_N[number] for number in numbers]
                for number, reply in zip(numbers, sampler(prompts, seeds=seeds, progress=advance), strict=True):
                    replies[number] = reply.text
                    resets += reply.resets > 0
                    self.cache_hook.add_partial("generate_until", requests[number].args, reply.text)
        console.print(f"{resets} of {len(replies)} replies have a reset", highlight=False)
        return replies

    def _sampler(self, request: dict) -> tuple[Sampler, int]:
        """Returns a sampler for what a task asks for, and the tokens that its prompts may have."""
        settings = dict(normalize_gen_kwargs(request, self._max_gen_toks))
        new_tokens, stop_strings = settings.pop("max_gen_toks"), settings.pop("until", None) or []
        temperature = settings.pop("temperature", 0.0)
        if not settings.pop("do_sample"):
            temperature = 0.0
        for name in settings:
            if name not in _SAMPLED:
                raise InputError(
                    f"the task sets {name!r} = {settings[name]!r} for its replies: {nearest(name, _SAMPLED)}"
                )
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(f"max_gen_toks is {new_tokens}, and the model has {self.max_length} positions")
        key = json.dumps(request, sort_keys=True)
        if key not in self._samplers:
            self._samplers.clear()  # each may hold a second copy of the weights
            params = dataclasses.replace(
                self._params,
                max_new_tokens=new_tokens,
                temperature=temperature,
                stop_strings=[
                    text for text in ([stop_strings] if isinstance(stop_strings, str) else stop_strings) if text
                ],
                max_num_seqs=self.batch_size,
                n=1,
                **settings,
            )
            self._samplers[key] = Sampler(self._model, self._tokenizer, params, reset_mode=self._reset_mode)
        return self._samplers[key], room

    def _say_cut(self, cut: int, of: int) -> None:
        if cut:
            _log.warning(
                "%d of %d contexts are longer than %d tokens: they lose their beginning", cut, of, self.max_length
            )


def _rows(batch_size: int | str, max_batch_size: int | None) -> int:
    if str(batch_size).startswith("auto"):
        return max_batch_size or _ROWS
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise InputError(f"batch_size is {batch_size!r}; it must be at least 1, or 'auto'")
    return int(batch_size)
