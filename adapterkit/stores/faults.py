"""What a store's answer means: try again, or one sentence that names the object and what to do."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from adapterkit.errors import AdapterkitError, AuthError, CheckpointError, NotFound, OutputError, StoreError, option
from adapterkit.places import Address

ATTEMPTS = 7
UNREACHED = 3  # attempts where there is no connection at all
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds; doubled each time, and a part of it left to chance
LONGEST_WAIT = 300.0  # seconds, where a store says how long
NO_CONNECTION = "no connection"
T = TypeVar("T")

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_AGAIN_CODES = frozenset(
    {
        *("RequestTimeout", "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "SlowDown", "IncompleteBody"),
        *("Md5Mismatch", "rateLimitExceeded", "userRateLimitExceeded"),
    }
)
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_STALE = frozenset({"authError", "InvalidAuthenticationInfo", "AuthenticationFailed"})  # expired perhaps, or wrong
_SKEWED = frozenset({"RequestTimeTooSkewed", "RequestInTheFuture"})
_WHO = frozenset(
    {
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthorizationHeaderMalformed"),
        *("AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"),
    }
)
_CHECK = {
    "s3": "check them (those of S3 with their region too)",
    "hf": "set HF_TOKEN to a token that may use the bucket, or log in (hf auth login)",
}
_NO_ROOM = ("Quota", "StorageFull", "InsufficientStorage", "NoSpace", "ServiceQuotaExceeded")


@dataclass
class Fault(Exception):
    """An answer that is no success, or none at all.

    Attributes:
        status: of HTTP; 0 where no whole answer came.
        code: the store's word for it, such as ``NoSuchKey``.
        words: for readers, where there is no status: what the connection did.
        attempts: how often it was asked for.
        most: attempts that it is worth, where that is fewer than usual.
        wait: seconds that the store asks to wait before the next one.
    """

    status: int = 0
    code: str = ""
    words: str = ""
    attempts: int = 1
    most: int = ATTEMPTS
    wait: float = 0.0

    @property
    def passing(self) -> bool:
        """Whether the same request may go well a little later."""
        if self.code in _EXPIRED or _no_room(self.code) or self.unknown:
            return False
        return self.status == 0 or self.status in _AGAIN or self.code in _AGAIN_CODES

    @property
    def expired(self) -> bool:
        return self.code in _EXPIRED

    @property
    def missing(self) -> bool:
        return self.status == 404

    @property
    def changed(self) -> bool:
        """A condition did not hold."""
        return self.status == 412

    @property
    def unknown(self) -> bool:
        """The store does not know what was asked for, such as a condition."""
        return self.status in (501, 405) or self.code in ("NotImplemented", "XNotImplemented")

    @property
    def said(self) -> str:
        return self.code or (f"HTTP {self.status}" if self.status else self.words or "no answer")


def _no_room(code: str) -> bool:
    return any(word in code for word in _NO_ROOM)


_again = 0


def _count_again() -> None:
    global _again
    _again += 1


def tried_again() -> int:
    """How many requests of this process were made once more so far."""
    return _again


def trying(request: Callable[[], T], renew: Callable[[], bool]) -> T:
    """The answer to a request, tried again while that may help.

    Args:
        renew: takes fresh credentials from where the first ones came; False where there are none.

    Raises:
        Fault: what remained.
    """
    pause, renewed = FIRST_PAUSE, False
    for made in range(1, ATTEMPTS + 1):
        try:
            return request()
        except Fault as fault:
            if (fault.expired or fault.code in _STALE) and not renewed and renew():
                renewed = True
                continue
            fault.attempts = made
            if not fault.passing or made >= min(UNREACHED if fault.words == NO_CONNECTION else ATTEMPTS, fault.most):
                raise
            asked = min(fault.wait, LONGEST_WAIT)
        _count_again()
        time.sleep(max(pause * (0.5 + random.random() / 2), asked))
        pause = min(pause * 2, LONGEST_PAUSE)
    raise AssertionError("unreachable")


def told(fault: Fault, what: str, *, writing: bool = False) -> AdapterkitError:
    """The error of a fault, for users; ``what`` names the object or the bucket. No answer is quoted beyond its code."""
    does = "written" if writing else "read"
    if fault.expired:
        hint = f"get new ones, then run it again{' with ' + option('resume', True) if writing else ''}"
        return AuthError(f"the credentials expired before {what} was {does}", hint)
    if fault.code in _SKEWED:
        return AuthError(f"the store refused {what}: the clock of this machine is off", "set the clock, then run again")
    if fault.code in _WHO or fault.status == 401:
        return AuthError(
            f"the store does not accept the credentials for {what} ({fault.said})",
            _CHECK.get(what.partition("://")[0], "check them"),
        )
    if _no_room(fault.code) or fault.status == 507:
        return OutputError(f"the store has no room for {what} ({fault.said})", "raise the quota or remove something")
    if fault.status == 403:
        return AuthError(f"the store refused {what} ({fault.said})", f"use credentials that let it be {does}")
    if fault.code == "NoSuchBucket":
        return NotFound(f"the bucket of {what} does not exist", "check its name and the endpoint")
    if fault.missing:
        return NotFound(f"{what} does not exist", "check the address, and the endpoint where you set one")
    if fault.changed and not writing:
        return CheckpointError(f"{what} changed while it was read", "run it again when nothing writes to it")
    if fault.status and not fault.passing:
        return StoreError(f"the store refused {what} ({fault.said})", "check the address and the endpoint")
    often = f" in {fault.attempts} attempts" if fault.attempts > 1 else ""
    return StoreError(f"{what} could not be {does}{often} ({fault.said})", "try again later")


def nonsense(what: str, who: str, where: str = "") -> StoreError:
    """The error of an answer that a service does not give: ``who`` it is, ``where`` its endpoint is named."""
    return StoreError(
        f"the answer about {what} is not one that {who} gives", f"see what answers at the endpoint{where}"
    )


@contextmanager
def sense(what: Address, who: str, where: str = "") -> Iterator[None]:
    """Where the fields of an answer are read: what is no answer of that service is a `StoreError`; see `nonsense`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise nonsense(str(what), who, where) from None
