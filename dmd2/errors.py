"""Exceptions that end a command in an orderly way."""

import signal


class UserError(Exception):
    """A problem the user can mend: one line saying which key or file, what is wrong, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved. `status` is the shell's exit status, 128 + signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: saved after iteration {step}; run the same command to go on")
        self.status = 128 + signum
