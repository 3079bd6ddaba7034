"""The one exception a user is meant to read."""


class UserError(Exception):
    """A problem the user can mend: one line saying which key or file, what is wrong, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
