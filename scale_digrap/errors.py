"""The root of the package's own errors: the command line prints these as one line, without a traceback."""

from scale_digrap.runtime.secrets import mask


class ScaleDigrapError(Exception):
    """Something the user can put right: the message names the thing, its value and the fix.

    Passwords and signatures of URLs are masked in it.
    """

    def __str__(self) -> str:
        return mask(super().__str__())

    exit_status = 2
    """What the command line ends with."""


class RunStopped(ScaleDigrapError):  # noqa: N818 (what was asked for is no error)
    """A run that ended early because it was asked to, with a checkpoint: the same command goes on from there."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again
