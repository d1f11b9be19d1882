"""API keys, and how much each of them may generate.

A key is 32 random bytes, so its plain sha256 is safe to store: nothing can be guessed. Limits are
token buckets in the memory of the one ingress process, so a restart forgets what was spent.

    key, digest = new_key()
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve.errors import ApiError
from serve.settings import ApiKey

PREFIX = "tsr-"
ANONYMOUS = "anonymous"
_MINUTE_S, _DAY_S = 60.0, 86_400.0


def new_key() -> tuple[str, str]:
    """A fresh key, to be shown once, and its sha256 for the settings."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, digest(key)


def digest(key: str) -> str:
    """The sha256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class TokenBucket:
    """`size` units at once, refilled evenly within `period_s` seconds."""

    def __init__(self, size: float, period_s: float, clock: Callable[[], float]) -> None:
        self.size, self._rate, self._clock = size, size / period_s, clock
        self._level, self._at = size, clock()

    def wait_s(self, cost: float) -> float:
        """Seconds until `cost` units can be taken; 0 is now."""
        now = self._clock()
        self._level = min(self.size, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (cost - self._level) / self._rate)

    def take(self, cost: float) -> None:
        """Spend `cost` units."""
        self._level -= cost

    def give_back(self, cost: float) -> None:
        """Return `cost` units, up to the bucket's size."""
        self._level = min(self.size, self._level + cost)


@dataclass(frozen=True)
class Account:
    """A key and its limits."""

    key: ApiKey
    images: TokenBucket
    megapixels: TokenBucket


class AccessControl:
    """Tells who calls, and limits how much they generate.

    Args:
        keys: the keys that are let in; with none everybody is, without limits.
        clock: seconds.
    """

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float] = time.monotonic) -> None:
        self._accounts = {
            key.name: Account(
                key,
                TokenBucket(key.pictures_per_minute, _MINUTE_S, clock),
                TokenBucket(key.megapixels_per_day, _DAY_S, clock),
            )
            for key in keys
        }

    def authenticate(self, authorization: str | None) -> str:
        """The client's name.

        Args:
            authorization: the header of that name.

        Raises:
            ApiError: 401 there is no key, or it is not known.
        """
        if not self._accounts:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("no API key; send the header 'Authorization: Bearer KEY'")
        sent, found = digest(key.strip()), None
        for name, account in self._accounts.items():  # all of them: the time taken tells nothing
            if hmac.compare_digest(sent, account.key.sha256):
                found = name
        if found is None:
            raise _unauthorized("this API key is not known; ask whoever runs this server")
        return found

    def charge(self, name: str, *, num_images: int, pixels: int) -> None:
        """Take the cost of a request from its client's limits; of all limits or of none.

        Args:
            name: from `authenticate`.
            num_images: that the request asks for.
            pixels: of one image.

        Raises:
            ApiError: 429 a limit is reached; 400 the request is above it however long one waits.
        """
        costs = self._costs(name, num_images, pixels)
        for bucket, cost, unit in costs:
            if cost > bucket.size:
                remedy = (
                    "ask for fewer pictures"
                    if num_images > 1
                    else "not even one fits, ask whoever runs this server for more"
                )
                raise ApiError(
                    400,
                    f"n={num_images} costs {cost:g} of this key's {bucket.size:g} {unit}; {remedy}",
                    code="invalid_value",
                    param="n",
                )
            wait_s = bucket.wait_s(cost)
            if wait_s > 0:
                raise ApiError(
                    429,
                    f"this key may draw {bucket.size:g} {unit}; try again in {wait_s:.0f} s",
                    code="rate_limit_exceeded",
                    type="rate_limit_error",
                    retry_after_s=wait_s,
                )
        for bucket, cost, _ in costs:
            bucket.take(cost)

    def refund(self, name: str, *, num_images: int, pixels: int) -> None:
        """Give back what `charge` took for images that were not generated."""
        for bucket, cost, _ in self._costs(name, num_images, pixels):
            bucket.give_back(cost)

    def _costs(
        self, name: str, num_images: int, pixels: int
    ) -> list[tuple[TokenBucket, float, str]]:
        """Per limit its bucket, the cost and the unit; empty where nothing is limited."""
        if name not in self._accounts:
            return []
        account = self._accounts[name]
        return [
            (account.images, float(num_images), "pictures per minute"),
            (account.megapixels, num_images * pixels / 1e6, "megapixels per day"),
        ]


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")
