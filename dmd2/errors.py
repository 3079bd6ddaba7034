"""Exceptions that end a command in an orderly way."""

import signal


class UserError(Exception):
    """A problem that the user can fix: one line with the key or file, the problem and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class Interrupted(Exception):
    """A signal stopped the run, after its state was saved. `status` is the shell's exit status, 128 + signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: saved after iteration {step}; run the same command to resume")
        self.status = 128 + signum
