"""The one exception that users are meant to see, and how texts of unknown origin are shown."""

import os
import unicodedata

MORE = "more in docs/troubleshooting.md"  # ends an error that needs more than a line
LONGEST = 8_000  # characters of an error; a list of a checkpoint's tensors may be long


class UserError(ValueError):
    """Input that a person can mend: what was expected, what was found, and the fix, in one line.

    Commands turn it into that line on stderr and exit status 2; the library raises it unchanged.
    Whatever names a message holds, it is made `visible` here.
    """

    def __init__(self, message: str):
        super().__init__(visible(" ".join(str(message).split()), LONGEST))


class Late(UserError):
    """A process of the job that did not come in time, or could not be reached.

    Nothing but time may mend that: commands end with status 75, and a supervisor starts them again.
    """


def visible(text: object, most: int = 500) -> str:
    """Returns a text of unknown origin as it may be printed: on one line, without hidden effects.

    Line ends, terminal escapes, marks that reverse the writing direction and lone surrogates show
    as their escapes (\\n, \\x1b, \\u202e), so that a name cannot forge a line of a log.

    Args:
      text: a name, prompt or path; anything else is shown by its `str`.
      most: characters that are shown; the rest is cut off and said to be.
    """
    if isinstance(text, os.PathLike):
        text = os.fspath(text)
    whole = text.decode(errors="backslashreplace") if isinstance(text, bytes) else str(text)
    shown = escaped(whole[:most])
    return shown if len(whole) <= most else f"{shown}... ({len(whole):,} characters)"


def escaped(text: str, keep: str = "") -> str:
    """Returns a text with every character that is not shown as itself written as its escape.

    Args:
      keep: characters that stay, such as line ends.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or _is_shown(c) else repr(c)[1:-1] for c in text)


def _is_shown(character: str) -> bool:
    # Besides what Python calls printable: all spaces, and the joiner of emoji.
    return (
        character.isprintable() or character == "\u200d" or unicodedata.category(character) == "Zs"
    )
