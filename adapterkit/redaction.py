"""What a secret looks like: never printed, recorded or published."""

from __future__ import annotations

import re

from adapterkit.errors import UnsafeError

# Tokens of code hosts and clouds, private keys, and what signs a temporary download address.
_OTHERS = (
    r"X-Amz-(?:Signature|Credential|Security-Token)=[^&\s]+|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# What is printed is redacted rather too often; what is published is refused only where it can hardly be prose.
_PRINTED = rf"hf_[A-Za-z0-9]{{8,}}|hf_jwt_[\w.-]+|(?i:bearer)\s+\S+|X-Amz-[\w-]+=[^&\s]+|Signature=[^&\s]+|{_OTHERS}"
_PUBLISHED = rf"hf_[A-Za-z0-9]{{20,}}|hf_jwt_[\w.-]{{8,}}|(?i:bearer)\s+[\w.~+/-]{{24,}}|{_OTHERS}"


def redact(text: str) -> str:
    """Text with every secret replaced."""
    return re.sub(_PRINTED, "<redacted>", text)


def holds_secret(text: str) -> bool:
    """Whether text holds something that looks like a secret."""
    return re.search(_PUBLISHED, text) is not None


def without_login(text: str) -> str:
    """Text whose addresses name no user and no password: ``https://user:password@host/`` is ``https://host/``."""
    return re.sub(r"(?<=://)[^/\s@]*(?:@[^/\s@]*)*@", "", text)


def check_public(text: str, where: str) -> None:
    """
    Raises:
        UnsafeError: the text holds something that looks like a secret; the sentence does not repeat it.
    """
    if holds_secret(text):
        raise UnsafeError(f"{where} holds what looks like a token or key", "take it out, and revoke it if it is real")
