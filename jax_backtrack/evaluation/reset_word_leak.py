"""Finds the words that `[RESET]` starts from in replies in which they have no place, such as "Yes, it'sundoSorry"."""

import re

from jax_backtrack.hub.reset import UNDOING_WORDS

_WORD = "(?:" + "|".join(UNDOING_WORDS) + ")"
# Behind a punctuation mark only these count: in "PIN:Sorry, I can't" a refusal lacks the space before it, no more.
_LOWER = "(?:" + "|".join(word for word in UNDOING_WORDS if word.islower()) + ")"
_LETTER = "0-9A-Za-z\u00c0-\u024f"  # scripts that put spaces between words: in Chinese "点击undo" is usual
# The word is over: it ends here, or a capital letter or another start word is glued to it. In "deleted" it is not over.
_OVER = f"(?=$|\\s|[^\\w\\s]|[A-Z]|{_WORD})"
# Words that end in a start word.
_WHOLE_WORD = re.compile(
    r"(?:a|ku|no|busy)wait|(?:p|hard|soft|factory|auto)reset|(?:un|hard|soft|auto)delete|(?:\w*[bcfgm]|ori|rot)undo",
    re.I,
)
_LONGEST = 20  # of these
_GLUED_IN_FRONT = re.compile(
    f"(?<=[{_LETTER}]){_WORD}{_OVER}|(?<=[{_LETTER}])['’:;,!?)\\]\"”]{_LOWER}{_OVER}|[.]{_LOWER}\\s*$"
)
# A capital letter behind it counts where a sentence begins; "deleteUser" and "waitFor" are names in a program.
_SENTENCE = r"(?:Sorry|I|It|The|That|This|You|Your|We|No|Yes|Of|Here|Please|Unfortunately)(?![0-9A-Za-z_])"
_GLUED_BEHIND = re.compile(f"(?<!\\w){_LOWER}(?:{_SENTENCE}|\\s*{_WORD}(?![a-z]))")
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`", re.DOTALL)


def leaks_reset_word(reply: str, prefix: str = "") -> bool:
    """Returns whether a word whose row `[RESET]` starts from stands in a reply where none belongs.

    That is one which is glued to the text before it ("it'sundo", "is:undo"), to the sentence behind it ("undoI can't")
    or to another one, or which has nothing but white space between it and another one ("is delete Sorry"). The case is
    that of `UNDOING_WORDS`: "Sorry" at the beginning of a sentence and "please wait" belong there. `prefix` is what was
    written for the model: a word in lower case that is glued to its end is one, whatever it ends with. Code in
    backquotes is left out, and so are words that end in a start word, such as "await".
    """
    glued_to_prefix = prefix and not prefix[-1].isspace() and reply.startswith(prefix)
    if glued_to_prefix and re.match(f"{_LOWER}(?![a-z])", reply[len(prefix) :]):
        return True
    text = _CODE.sub(" ", reply)
    return bool(_GLUED_BEHIND.search(text)) or any(
        not _is_whole_word(text, match) for match in _GLUED_IN_FRONT.finditer(text)
    )


def _is_whole_word(text: str, match: re.Match) -> bool:
    """Returns whether the match ends a word of its own, and not letters that are glued to an apostrophe."""
    letters = re.search(rf"(?<![\w'’])[{_LETTER}]*$", text[max(0, match.end() - _LONGEST) : match.end()])
    return letters is not None and _WHOLE_WORD.fullmatch(letters[0]) is not None
