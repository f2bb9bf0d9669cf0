"""Texts that can be written to a file."""


def is_unicode(text: str) -> bool:
    """Returns whether a text can be written to a file. JSON escapes can name half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
