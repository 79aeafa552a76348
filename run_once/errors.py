"""Every exception and warning of the client, in one tree.

BUSY, DONE and LOST are values; an exception is for what the caller could not foresee. The
message of each says what was wrong, which key or option it was, and what to do. No exception
of gRPC reaches a user.
"""

from __future__ import annotations


class RunOnceError(Exception):
    """Base of everything that run_once raises on its own account."""


class ConfigError(RunOnceError):
    """An option has a value that cannot be used, or a needed one is missing."""


class ServerUnavailableError(RunOnceError):
    """The lock server could not be reached within the bound on retries."""


class ServerError(RunOnceError):
    """The lock server refused a request or answered what it should not.

    Attributes:
        code: Name of the gRPC status, such as NOT_FOUND; empty if there was none.
    """

    code: str = ""


class AccessError(ServerError):
    """The lock server does not let this client in, or not do that: token, role or certificate."""


class LimitError(RunOnceError, ValueError):
    """A key, an option or a request goes over a limit; nothing was changed."""


class KeyTypeError(RunOnceError, TypeError):
    """A key is neither a string nor an integer."""


class UnkeyableError(RunOnceError, TypeError):
    """No key can be computed from a function or an argument."""


class AmbiguousKeyError(RunOnceError, ValueError):
    """A key fits more than one lease of this process."""


class NotHeldError(RunOnceError):
    """This process holds no lease on the key."""


class LeaseLostError(RunOnceError):
    """The lease was lost: another holder was granted the key, or it was reset."""


class AlreadyDoneError(RunOnceError, ValueError):
    """The key was completed by another holder."""


class ExhaustedError(RunOnceError):
    """The key was attempted as often as max_attempts allows."""


class ResultError(RunOnceError):
    """A value cannot be stored or loaded."""


class SignatureError(ResultError):
    """A stored value was not signed with this user's secret; it was not unpickled."""


class ResultMissingError(ResultError):
    """The value of a done key is gone; its key may be made not done."""


class ResultDamagedError(ResultMissingError):
    """A stored value is cut off or fails its checksum; its key may be made not done."""


class ResultTooLargeError(ResultError):
    """A value is larger than the server takes."""


class RunOnceWarning(UserWarning):
    """Base of the warnings that run_once gives."""


class LeaseLostWarning(RunOnceWarning):
    """A lease was lost, and the work done under it was not accepted."""
