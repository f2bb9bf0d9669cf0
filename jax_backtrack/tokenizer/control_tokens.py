"""Which added tokens text may give, which only a template may, and encoders that keep the two apart."""

import re
import secrets
from collections.abc import Iterator, Sequence

from tokenizers import AddedToken, Tokenizer

from jax_backtrack.errors import InputError

NOT_UNICODE = "is not valid Unicode: it holds half of a surrogate pair"
# Added tokens that text may give. Gemma-2 keeps runs of white space and HTML tags as added tokens that are not special,
# and its models have read them in text as one token each; "\u2581" is how it spells a space. All other added tokens may
# steer a model, special or not: Gemma-2 has "<mask>", "[@BOS@]", "[toxicity=0]" and "<unused0>" in the same list.
_TEXT_TOKEN = re.compile(
    r"[\s\u2581]+|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)


class ControlTokens:
    """The added tokens that text never becomes.

    ids:      by how they are spelled
    alphabet: characters of which each of them has at least one: those that they are spelled with, without white space
              where a token has others
    """

    def __init__(self, backend: Tokenizer):
        text_tokens, controls = [], {}
        for index, token in sorted(backend.get_added_tokens_decoder().items()):
            # One outside the model's own vocabulary would have another id in a copy with fewer added tokens.
            in_vocabulary = backend.model.token_to_id(token.content) == index
            if not token.special and in_vocabulary and _TEXT_TOKEN.fullmatch(token.content):
                text_tokens.append(token)
            else:
                controls[index] = token
        self.ids = {token.content: index for index, token in controls.items()}
        self.alphabet = "".join(sorted({sign for token in self.ids for sign in ("".join(token.split()) or token)}))
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._text_only = _copy(backend, text_tokens)
        # Control tokens under names that no text can guess: what is spelled like one stays text in the same call.
        secret = secrets.token_hex(16)
        self._names = {index: f"<{secret}:{index}>" for index in controls}
        renamed = [_renamed(token, self._names[index]) for index, token in controls.items()]
        self._with_names = _copy(backend, [*text_tokens, *renamed])
        self._true_id = {self._with_names.token_to_id(name): index for index, name in self._names.items()}

    def find(self, text: str) -> Iterator[re.Match]:
        """Yields the places where a control token is spelled."""
        return self._pattern.finditer(text)

    def blank(self, text: str, sign: str) -> str:
        """Returns the text with `sign` for every character of a control token that it spells."""
        return self._pattern.sub(lambda match: sign * len(match[0]), text)

    def encode_text(self, text: str) -> list[int]:
        """Returns the ids of a text by itself, in which nothing is a control token."""
        return _encode(self._text_only, text)

    def encode_parts(self, parts: Sequence[int | str]) -> list[int]:
        """Returns the ids of texts with ids of control tokens between them, encoded in one piece.

        As the tokenizer does it: white space beside a token that takes it (`lstrip`, `rstrip`) goes, and only the
        beginning of the whole is the beginning of a text.
        """
        whole = "".join(part if isinstance(part, str) else self._names[part] for part in parts)
        encoding = _encode(self._with_names, whole)
        if sum(index in self._true_id for index in encoding) != sum(not isinstance(part, str) for part in parts):
            spelled = {index: token for token, index in self.ids.items()}
            tokens = ", ".join(dict.fromkeys(repr(spelled[part]) for part in parts if not isinstance(part, str)))
            raise InputError(
                f"the tokenizer does not read each of {tokens} as one token where the chat template has it"
            )
        return [self._true_id.get(index, index) for index in encoding]


def _renamed(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized
    )


def _copy(backend: Tokenizer, added_tokens: list[AddedToken]) -> Tokenizer:
    """Returns a tokenizer with the same vocabulary, which it shares, and with these added tokens only."""
    copy = Tokenizer(backend.model)
    copy.normalizer = backend.normalizer
    copy.pre_tokenizer = backend.pre_tokenizer
    copy.add_tokens(added_tokens)
    return copy


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:
        raise InputError(f"a text {NOT_UNICODE}") from None
