"""The exceptions that mean: this is the message, and a traceback would add nothing."""


class UserError(ValueError):
    """Bad configuration or input; the command line prints it alone and exits with code 2."""


class RunError(RuntimeError):
    """A run that cannot go on; the command line prints it alone and exits with code 1."""


class DivergedError(RunError):
    """Training has gone wrong, and would again."""
