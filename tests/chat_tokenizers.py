"""Small tokenizers with a chat template, and what transformers makes of a conversation."""

import datetime

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


MARKS = ("<|im_start|>", "<|im_end|>")


def small_tokenizer(template: str | None = CHATML, special=MARKS, ordinary=(), merges=()) -> ChatTokenizer:
    """A tokenizer of single bytes and of `ordinary` tokens, some of which `merges` may join."""
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *ordinary]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return chat_tokenizer(backend, template, special)


def chat_tokenizer(backend: Tokenizer, template: str | None, special) -> ChatTokenizer:
    backend.add_special_tokens(list(special))
    return ChatTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template))


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def by_transformers(tokenizer: ChatTokenizer, messages) -> list[int]:
    return tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


# Gemma-2's added tokens that text may give: runs of newlines and of spaces, HTML tags, runs of tabs.
GEMMA2_TEXT = {*range(108, 217), *range(255969, 255999)}


# As the template of Llama-3.2: the date is today's where the renderer can tell.
DATED = (
    "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "<|im_start|>system\nToday Date: {{ day }}<|im_end|>\n" + CHATML
)


# Time zones in which it is past noon, a day apart: midnight does not come while a test runs.
_WEST = (datetime.datetime.now(datetime.UTC).hour - 12) % 24


EARLY, LATE = f"EARLY+{_WEST}", f"LATE-{24 - _WEST}"
