"""What a server takes on."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from w2v2.errors import Count, Positive, UsageError, Whole, check_ranges


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a server listens, and its limits."""

    host: str = "127.0.0.1"
    """Address to listen at; one that is not this machine's own needs ``token``."""
    port: Whole = 8000
    """Port; 0: any that is free."""
    token: str | None = None
    """That clients must know; better given as W2V2_TOKEN in the environment, where others do not see it."""
    batch_size: Count = 4
    """Requests that are worked on at a time, in batches."""
    queue: Count = 128
    """Requests at a time; more are told to come again."""
    streams: Count = 8
    """Live streams at a time."""
    upload_mb: Positive = 200.0
    """Size of an upload, MB."""
    upload_minutes: Positive = 120.0
    """Length of its audio, minutes."""
    stall_seconds: Positive = 30.0
    """A client that is silent for so long is let go."""

    def check(self) -> None:
        """Refuse what cannot be, or is not safe; UsageError names the field."""
        check_ranges(self)
        if not self.local and not self.token:
            raise UsageError(f"`host` {self.host} can be reached by others: name a `token` that they must know")
        if self.token and not re.fullmatch("[!-~]+", self.token):
            raise UsageError("`token` must be ASCII without blanks, which clients can send; take another")
        if self.port > 65_535:
            raise UsageError(f"`port` must be 0 to 65535, got {self.port}")

    @property
    def local(self) -> bool:
        """Whether it listens on this machine alone."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
