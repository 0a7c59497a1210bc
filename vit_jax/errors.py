"""The one exception a user is meant to see."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix. The message says what is wrong, where, and what to do.
    Commands print it on stderr without a traceback and exit with code 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `known`, or `"."` where nothing is near."""
    known = list(known)
    close = [other for other in known if other.lower() == name.lower()]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."
