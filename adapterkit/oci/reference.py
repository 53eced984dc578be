"""What names an artifact: ``oci://host[:port]/name[:tag][@sha256:digest]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterkit.errors import UsageError

SCHEME = "oci://"
# The grammar of the OCI distribution specification, section "Pulling manifests"; a host as in RFC 3986, without a user.
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?|\[[0-9A-Fa-f:]+\](?::[0-9]{1,5})?"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_REFERENCE = re.compile(
    rf"(?P<host>{_HOST})/(?P<name>{_PART}(?:/{_PART})*)(?::(?P<tag>{_TAG}))?(?:@sha256:(?P<hex>[0-9a-f]{{64}}))?"
)
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]+)?")


@dataclass(frozen=True)
class OciReference:
    """An artifact. ``tag`` and ``digest`` (hex of a sha256) are empty where they are not given; ``plain`` means HTTP."""

    host: str
    name: str
    tag: str = ""
    digest: str = ""
    plain: bool = False

    @property
    def pointer(self) -> str:
        """What the manifest is asked for by: the digest, else the tag."""
        return f"sha256:{self.digest}" if self.digest else self.tag

    @property
    def address(self) -> str:
        return f"{'http' if self.plain else 'https'}://{self.host}"

    def __str__(self) -> str:
        tag, digest = f":{self.tag}" if self.tag else "", f"@sha256:{self.digest}" if self.digest else ""
        return f"{SCHEME}{self.host}/{self.name}{tag}{digest}"


def is_oci(text: str) -> bool:
    """Whether a reference is one of an OCI registry."""
    return text.startswith(SCHEME)


def parse_oci(text: str, *, plain: bool = False) -> OciReference:
    """A reference; without tag and digest the tag ``latest`` is meant, as every OCI client has it.

    Args:
        plain: speak HTTP; on the loopback interface that is done in any case.

    Raises:
        UsageError: it is none.
    """
    found = _REFERENCE.fullmatch(text.removeprefix(SCHEME)) if is_oci(text) else None
    if found is None or len(found["name"]) > 255:
        raise UsageError(
            f"'{text}' names no artifact", "give it like oci://host/name:tag or oci://host/name@sha256:..."
        )
    tag = found["tag"] or ("" if found["hex"] else "latest")
    near = _LOOPBACK.fullmatch(found["host"]) is not None
    return OciReference(found["host"], found["name"], tag, found["hex"] or "", plain or near)
