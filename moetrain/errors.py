"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """Bad configuration or input; the command line prints it alone and exits with code 2."""
