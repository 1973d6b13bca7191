"""The root of the package's own errors: the command line prints these as one line, without a traceback."""


class ScaleDigrapError(Exception):
    """Something the user can put right: the message names the thing, its value and the fix."""
