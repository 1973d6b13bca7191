"""What the errors of storage libraries mean: not there, not allowed, credentials that are wrong, or try again."""

from __future__ import annotations

from collections.abc import Mapping

from scale_digrap.data.errors import ReadError
from scale_digrap.data.urls import scrub, show
from scale_digrap.runtime.text import one_line


class FetchError(ReadError):
    """A remote object that could not be had; `missing` if the place answered that it is not there, `denied` if it
    answers so to this user, which some places do for what is not there."""

    def __init__(self, message: str, *, missing: bool = False, denied: bool = False) -> None:
        super().__init__(message)
        self.missing, self.denied = missing, denied


def listing_problem(error: Exception, url: str) -> FetchError:
    """The error for a pattern whose matches cannot be listed."""
    reason = final_error(error, url)
    return reason or FetchError(
        f"{show(url)}: cannot be listed: {one_line(scrub(f'{type(error).__name__}: {error}', url))}"
    )


def final_error(error: Exception, url: str) -> FetchError | None:
    """What an error of a storage library means, if no other attempt mends it."""
    problem = credentials_problem(error)
    if problem is not None:
        return FetchError(
            f"{show(url)}: {problem}. Renew them, or name others: in the environment, in a profile, or in "
            "data.storage_options"
        )
    if isinstance(error, FileNotFoundError):
        return FetchError(f"{show(url)}: no such object", missing=True)
    if isinstance(error, PermissionError):
        return FetchError(
            f"{show(url)}: access denied: these credentials may not read it, or it does not exist", denied=True
        )
    return None


_CREDENTIAL_CODES = {
    "ExpiredToken": "the credentials have expired",
    "ExpiredTokenException": "the credentials have expired",
    "RequestExpired": "the credentials have expired",
    "TokenRefreshRequired": "the credentials have expired",
    "InvalidToken": "the session token is not valid",
    "InvalidAccessKeyId": "the store does not know this access key",
    "InvalidClientTokenId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "RequestTimeTooSkewed": "the clock of this machine is wrong, so that its signatures are not valid",
}
"""What S3 answers to a request with the wrong credentials, apart from a plain 403, which says nothing."""

_CREDENTIAL_ERRORS = {
    "NoCredentialsError": "there are no credentials",  # botocore
    "PartialCredentialsError": "the credentials are not complete",
    "ProfileNotFound": "there is no such profile",
    "CredentialRetrievalError": "the credentials cannot be had",
    "TokenRetrievalError": "the login has expired",
    "SSOTokenLoadError": "there is no login",
    "UnauthorizedSSOTokenError": "the login has expired",
    "DefaultCredentialsError": "there are no credentials",  # google.auth
    "RefreshError": "the credentials cannot be renewed",
    "ClientAuthenticationError": "the credentials are not valid",  # azure
}
"""By the names of the classes: the packages need not be installed."""


def credentials_problem(error: BaseException) -> str | None:
    """What is wrong with the credentials, if that is what an error of a storage library says."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ in _CREDENTIAL_ERRORS:
            return _CREDENTIAL_ERRORS[type(seen).__name__]
        response = getattr(seen, "response", None)
        if isinstance(response, Mapping) and isinstance(response.get("Error"), Mapping):
            code = str(response["Error"].get("Code"))
            if code in _CREDENTIAL_CODES:
                return f"{_CREDENTIAL_CODES[code]} ({code})"
        seen = seen.__cause__
    return None
