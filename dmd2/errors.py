"""Exceptions that end a command in an orderly way."""

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """A problem that the user can fix: one line with the key or file, the problem and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class Interrupted(Exception):
    """A signal stopped the run, after its state was saved. `status` is the shell's exit status, 128 + signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: saved after iteration {step}; run the same command to resume")
        self.status = 128 + signum


def closest(wrong: str, known: Iterable[str]) -> str | None:
    """The known name that `wrong` begins or resembles, or None."""
    names = list(known)
    begun = [name for name in names if wrong and name.startswith(wrong)]
    return next(iter(begun or difflib.get_close_matches(wrong, names, n=1, cutoff=0.65)), None)


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, or all of them."""
    names = sorted(known)
    close = closest(wrong, names)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(names) or 'none'}"
