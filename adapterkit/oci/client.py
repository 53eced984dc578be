"""The OCI distribution API, version 1.1: blobs, manifests, referrers.

Every byte that comes is held against its digest. A token goes to the registry that asked for it: redirects are followed for
blobs alone (registries keep them in object stores), without the token, and never from HTTPS to HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urljoin

from adapterkit.checkpoint.json_data import parse_json
from adapterkit.disk import read_regular
from adapterkit.errors import AdapterkitError, AuthError, CheckFailed, NotFound, ServerError
from adapterkit.foreign import is_whole
from adapterkit.oci.reference import OciReference
from adapterkit.web import WebAnswer, WebStream, ask, parts_of, stream

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LARGEST_MANIFEST = 4 << 20
"""Bytes; the distribution specification asks registries to take at least this much."""
_SLOWEST = 1 << 20  # bytes a second that a transfer may come down to, before its time is over
_REDIRECTS = 3
_QUICK = 60.0


@dataclass(frozen=True)
class Descriptor:
    """What the registry holds: media type, sha256 (hex), size in bytes, annotations."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"mediaType": self.media_type, "digest": f"sha256:{self.digest}", "size": self.size}
        return {**plain, "annotations": dict(self.annotations)} if self.annotations else plain


@dataclass(frozen=True)
class Manifest:
    """A manifest as its bytes are; ``digest`` is their sha256 (hex)."""

    data: bytes
    value: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class OciRegistry:
    """One repository of a registry."""

    def __init__(self, reference: OciReference) -> None:
        self.reference = reference
        self._base = f"{reference.address}/v2/{reference.name}"
        self._headers: dict[str, str] = {}

    # ---- requests

    def _ask(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, most: int = 8 << 20, **given: Any
    ) -> WebAnswer:
        url = path if "://" in path else self._base + path
        for attempt in (1, 2):
            if hasattr(given.get("data"), "seek"):
                given["data"].seek(0)
            found = ask(method, url, headers={**self._sent(url), **(headers or {})}, most=most, **given)
            if found.status != 401 or attempt == 2:
                break
            self._log_in(found, "pull" if method in ("GET", "HEAD") else "pull,push")
        return self._checked(found, f"{method} {parts_of(url).path}")

    def _sent(self, url: str) -> dict[str, str]:
        """The token, where the address is the registry's own."""
        return self._headers if parts_of(url).netloc == self.reference.host else {}

    def _checked(self, found: WebAnswer, what: str) -> WebAnswer:
        if found.status in (401, 403):
            raise AuthError(
                f"{self.reference.host} does not allow {what}", f"log in to it: docker login {self.reference.host}"
            )
        if found.status == 429 or found.status >= 500:
            raise ServerError(f"{self.reference.host} failed at {what} ({_said(found)})", "try again")
        return found

    def _log_in(self, refused: WebAnswer, actions: str) -> None:
        """Get what the registry asks for by ``WWW-Authenticate``.

        Raises:
            AuthError: it asks for something else, or there is no login.
        """
        wanted = refused.headers.get("www-authenticate", "")
        basic = login_of(self.reference.host)
        kind, _, rest = wanted.partition(" ")
        if kind.lower() == "basic" and basic:
            self._headers = {"Authorization": f"Basic {basic}"}
            return
        fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = fields.get("realm", "")
        if kind.lower() != "bearer" or not realm:
            return
        if parts_of(realm).scheme != "https" and not (self.reference.plain and parts_of(realm).scheme == "http"):
            raise AuthError(f"{self.reference.host} asks for a login at {realm}, which is not safe", "use HTTPS")
        query = {"scope": f"repository:{self.reference.name}:{actions}"}
        if "service" in fields:
            query["service"] = fields["service"]
        sent = {"Authorization": f"Basic {basic}"} if basic else {}
        found = ask("GET", f"{realm}?{urlencode(query)}", headers=sent, timeout=_QUICK)
        token = found.value.get("token") or found.value.get("access_token") if isinstance(found.value, dict) else None
        if not found.ok or not isinstance(token, str):
            raise AuthError(
                f"{parts_of(realm).netloc} gives no token for {self.reference}", f"docker login {self.reference.host}"
            )
        self._headers = {"Authorization": f"Bearer {token}"}

    # ---- blobs

    def has_blob(self, digest: str, size: int) -> bool:
        found = self._ask("HEAD", f"/blobs/sha256:{digest}", timeout=_QUICK)
        said = found.headers.get("content-length", "")
        if found.ok and is_whole(said) and int(said) != size:
            raise CheckFailed(
                f"{self.reference.host} has a blob {digest[:12]} of {said} bytes, and it has {size}", "look at it"
            )
        return found.ok

    def put_blob(self, digest: str, size: int, source: Path | bytes, mount: tuple[str, ...] = ()) -> str:
        """Store a blob that is not there; ``kept``, ``mounted`` or ``uploaded``.

        Args:
            mount: repositories of the same registry that may have it.

        Raises:
            ServerError, AuthError
            CheckFailed: the registry got other bytes.
        """
        if self.has_blob(digest, size):
            return "kept"
        for other in mount:
            asked = urlencode({"mount": f"sha256:{digest}", "from": other})
            if self._ask("POST", f"/blobs/uploads/?{asked}", data=b"", timeout=_QUICK).status == 201:
                return "mounted"
        begun = self._ask("POST", "/blobs/uploads/", data=b"", timeout=_QUICK)
        place = begun.headers.get("location", "")
        if begun.status != 202 or not place:
            raise ServerError(f"{self.reference.host} takes no upload ({_said(begun)})", "see its settings")
        url = _joined(self._base + "/", place)
        self._safe(url)
        url += ("&" if parts_of(url).query else "?") + f"digest={quote(f'sha256:{digest}')}"
        timeout = _QUICK + size / _SLOWEST
        headers = {"Content-Type": "application/octet-stream"}
        if isinstance(source, bytes):
            done = self._ask("PUT", url, data=source, headers=headers, timeout=timeout)
        else:
            with open(source, "rb") as file:
                done = self._ask("PUT", url, data=file, size=size, headers=headers, timeout=timeout)
        if done.status != 201:
            kind = CheckFailed if done.status == 400 else ServerError
            raise kind(f"{self.reference.host} did not take a blob of {size} bytes ({_said(done)})", "push it again")
        return "uploaded"

    @contextmanager
    def blob(self, digest: str, size: int, *, start: int = 0, length: int | None = None) -> Iterator[WebStream]:
        """The bytes of a blob, or a range of them; the caller holds them against the digest."""
        url, headers = f"{self._base}/blobs/sha256:{digest}", {}
        if length is not None:
            headers["Range"] = f"bytes={start}-{start + length - 1}"
        timeout = _QUICK + (size if length is None else length) / _SLOWEST
        for attempt in range(_REDIRECTS + 2):
            with stream("GET", url, headers={**self._sent(url), **headers}, timeout=timeout) as found:
                if found.status == 401 and attempt == 0:
                    self._log_in(WebAnswer(401, found.headers), "pull")
                    continue
                if found.status in (301, 302, 303, 307, 308) and "location" in found.headers:
                    url = _joined(url, found.headers["location"])
                    self._safe(url)
                    continue
                answer = WebAnswer(found.status, found.headers, url=url)
                self._checked(answer, f"GET {parts_of(url).path}")
                if not answer.ok:
                    raise NotFound(
                        f"{self.reference.host} does not have the blob {digest[:12]} ({found.status})", "push it again"
                    )
                if length is not None and found.status != 206 and (start or length != size):
                    raise ServerError(f"{self.reference.host} gives no ranges of a blob", "pull the whole artifact")
                yield found
                return
        raise ServerError(f"{self.reference.host} sends us around in circles", "try again")

    def read_blob(self, digest: str, size: int) -> bytes:
        """A small blob, held against its digest.

        Raises:
            CheckFailed: it has other bytes.
        """
        with self.blob(digest, size) as found:
            data = b"".join(found.blocks(size + 1))
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise CheckFailed(f"{self.reference.host} gave other bytes than those of {digest[:12]}", "pull it again")
        return data

    def _safe(self, url: str) -> None:
        scheme = parts_of(url).scheme
        if scheme != "https" and not (self.reference.plain and scheme == "http"):
            raise ServerError(
                f"{self.reference.host} sends us to {scheme}://{parts_of(url).netloc}", "it has to be HTTPS"
            )

    # ---- manifests

    def manifest(self, pointer: str, accept: str = MANIFEST) -> Manifest | None:
        """The manifest that a tag or ``sha256:...`` means; None when there is none.

        Raises:
            CheckFailed: it has other bytes than its digest says.
            ServerError: it is no JSON object.
        """
        found = self._ask(
            "GET", f"/manifests/{pointer}", headers={"Accept": accept}, most=LARGEST_MANIFEST, timeout=_QUICK
        )
        if found.status in (404, 400):
            return None
        made = Manifest(found.data, found.value if isinstance(found.value, dict) else {})
        said = found.headers.get("docker-content-digest", f"sha256:{made.digest}")
        if pointer.startswith("sha256:"):
            said = pointer
        if said != f"sha256:{made.digest}":
            raise CheckFailed(f"{self.reference.host} gave another manifest than {said[:19]}", "pull it again")
        if not made.value:
            raise ServerError(f"{self.reference} is no manifest", "see what answers at that address")
        return made

    def put_manifest(self, pointer: str, data: bytes, media_type: str = MANIFEST) -> str:
        """Store a manifest under a tag or its digest; its digest (hex)."""
        digest = hashlib.sha256(data).hexdigest()
        found = self._ask(
            "PUT", f"/manifests/{pointer}", data=data, headers={"Content-Type": media_type}, timeout=_QUICK
        )
        if found.status != 201:
            raise ServerError(f"{self.reference.host} did not take the manifest ({_said(found)})", "see its settings")
        return digest

    def referrers(self, digest: str, artifact_type: str) -> list[Descriptor]:
        """What names a manifest as its subject; by the tag of the specification where the registry has no such list."""
        found = self._ask(
            "GET", f"/referrers/sha256:{digest}", headers={"Accept": INDEX}, most=LARGEST_MANIFEST, timeout=_QUICK
        )
        value = found.value if found.ok else None
        if not isinstance(value, dict):
            listed = self.manifest(f"sha256-{digest}", INDEX)
            value = listed.value if listed else {}
        rows = value.get("manifests")
        found_rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [descriptor(row, "a referrer") for row in found_rows if row.get("artifactType") == artifact_type]


def descriptor(row: Any, what: str) -> Descriptor:
    """
    Raises:
        CheckFailed: it is no descriptor of something that has a sha256.
    """
    if isinstance(row, dict):
        digest, size = str(row.get("digest", "")), row.get("size")
        notes = row.get("annotations") or {}
        plain = isinstance(notes, dict) and all(isinstance(v, str) for v in notes.values())
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) and type(size) is int and 0 <= size < 1 << 50 and plain:
            return Descriptor(str(row.get("mediaType", "")), digest[7:], size, notes)
    raise CheckFailed(
        f"the manifest describes {what} without a sha256 and a size", "it was not made by a client of OCI"
    )


def _joined(url: str, place: str) -> str:
    """The address that a header names.

    Raises:
        ServerError: it is none.
    """
    try:
        return urljoin(url, place)
    except ValueError:
        raise ServerError(f"'{place[:100]}' is no address of a server", "see what answers at the registry") from None


def _said(found: WebAnswer) -> str:
    value = found.value
    errors = value.get("errors") if isinstance(value, dict) else None
    if isinstance(errors, list) and errors and isinstance(errors[0], dict):
        return f"{found.status}: {errors[0].get('code', '')} {errors[0].get('message', '')}".strip()[:200]
    return str(found.status)


def login_of(host: str) -> str:
    """The base64 of user and password for a registry, as ``docker login``, ``podman login`` or ``oras login`` keeps it.

    Raises:
        AuthError: it is kept by a helper program, which is not run here.
    """
    home = Path.home()
    places = [
        Path(os.environ["REGISTRY_AUTH_FILE"]) if "REGISTRY_AUTH_FILE" in os.environ else None,
        Path(os.environ.get("DOCKER_CONFIG", str(home / ".docker"))) / "config.json",
        Path(os.environ["XDG_RUNTIME_DIR"]) / "containers" / "auth.json" if "XDG_RUNTIME_DIR" in os.environ else None,
    ]
    helper = False
    for place in places:
        if place is None or not place.is_file():
            continue
        try:
            value = parse_json(read_regular(place, 1 << 20), str(place))
        except AdapterkitError:
            continue
        logins = value.get("auths") or {} if isinstance(value, dict) else None
        row = logins.get(host) or {} if isinstance(logins, dict) else None
        if not isinstance(row, dict):
            continue
        said = row.get("auth", "")
        if not said and row.get("username"):
            said = base64.b64encode(f"{row['username']}:{row.get('password', '')}".encode()).decode()
        if said:
            return str(said)
        helper = (
            helper
            or host in (value.get("credHelpers") or {})
            or bool(value.get("credsStore") and host in (value.get("auths") or {}))
        )
    if helper:
        raise AuthError(
            f"the login for {host} is kept by a helper program, which is not run here",
            "put it in a file of its own, and name that with $REGISTRY_AUTH_FILE",
        )
    return ""
