"""S3, and what speaks like it: read through obstore, written through boto3, which knows uploads of copied parts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

from adapterkit.errors import AdapterkitError, OutputError
from adapterkit.places import Address
from adapterkit.stores import meter
from adapterkit.stores.faults import NO_CONNECTION, Fault, nonsense, sense, told
from adapterkit.stores.objects import ObjectStore
from adapterkit.stores.store import Assembly, Begun, HeldPart, Store, StoredObject

DELETED_AT_ONCE = 1000
CONNECTIONS = 64
_WHO = "S3"


@dataclass
class Client:
    """boto3's client, and what obstore has to be told to talk to the same place as the same user."""

    session: Any
    bucket: str
    s3: Any
    credentials: Any
    endpoint: str
    region: str
    path_style: bool

    def provide(self) -> Any:
        """Credentials for obstore, asked for again every few minutes."""
        from datetime import datetime, timedelta, timezone

        held = self.credentials.get_frozen_credentials()
        return {
            "access_key_id": held.access_key,
            "secret_access_key": held.secret_key,
            "token": held.token,
            "expires_at": datetime.now(timezone.utc) + timedelta(minutes=5),
        }


def client_of(session: Any, bucket: str) -> Client:
    """boto3's client for a bucket.

    Raises:
        botocore.exceptions.BotoCoreError, ValueError: settings that it does not understand.
    """
    credentials = session.get_credentials()
    more: dict[str, Any] = {} if credentials is not None else {"signature_version": botocore.UNSIGNED}
    plain = session.client("s3", region_name=session.region_name or "us-east-1")
    ours = ".amazonaws.com" in (plain.meta.endpoint_url or "")
    own = session._session.get_scoped_config().get("s3") or {}
    style = own.get("addressing_style") if isinstance(own, dict) else None
    style = style or ("auto" if ours else "path")
    config = botocore.config.Config(
        retries={"total_max_attempts": 1},
        connect_timeout=10,
        read_timeout=120,
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": style},
        # Every upload carries an MD5 of its own; what is read is held against its length and ETag.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **more,
    )
    region = session.region_name or (_region(session, bucket, config) if ours else "us-east-1")
    s3 = session.client("s3", region_name=region, config=config)
    endpoint = "" if ours else str(s3.meta.endpoint_url)
    return Client(session, bucket, s3, credentials, endpoint, region, style == "path")


def _region(session: Any, bucket: str, config: Any) -> str:
    """Where Amazon keeps a bucket; it tells anybody."""
    try:
        found = session.client("s3", region_name="us-east-1", config=config).head_bucket(Bucket=bucket)
    except botocore.exceptions.ClientError as error:
        found = error.response
    except botocore.exceptions.BotoCoreError:
        found = {}
    return str(found.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", "us-east-1"))


class S3(ObjectStore):
    """A bucket of S3.

    Args:
        made: boto3's client.
        reader: makes obstore's store of it.
    """

    def __init__(self, root: Address, made: Client, reader: Callable[[], Any]) -> None:
        super().__init__(root, reader())
        self._made, self._reader = made, reader

    def renew(self) -> bool:
        try:
            fresh = client_of(boto3.session.Session(), self.root.bucket)
        except (botocore.exceptions.BotoCoreError, ValueError):
            return False
        before, now = self._made.credentials, fresh.credentials
        if now is None or (before is not None and now.access_key == before.access_key and now.token == before.token):
            return False
        self._made.s3, self._made.credentials = fresh.s3, now
        self._client = self._reader()
        return True

    def call(self, name: str, **given: Any) -> dict[str, Any]:
        """One request of boto3, without a second attempt; the bucket is this one."""
        try:
            found: dict[str, Any] = getattr(self._made.s3, name)(Bucket=self.root.bucket, **given)
        except botocore.exceptions.ClientError as error:
            said = error.response.get("Error", {})
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code = str(said.get("Code", ""))
            raise Fault(status, "" if code.isdigit() else code) from None
        except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError):
            raise Fault(401, "NoCredentials") from None
        except botocore.exceptions.BotoCoreError as error:
            raise Fault(words=_said(error)) from None
        # What boto3 itself cannot read: a number or a date that is none.
        except (ValueError, TypeError, KeyError, RuntimeError):
            raise nonsense(str(self.place(str(given.get("Key", "")))), _WHO) from None
        return found

    def head(self, key: str) -> StoredObject | None:
        try:
            found = self.ask(lambda: self.call("head_object", Key=key), self.place(key), pass_on=True)
        except Fault as fault:
            self.missing(fault, key)
            return None
        with sense(self.place(key), _WHO):
            marks, written = dict(found.get("Metadata", {})), found.get("LastModified")
            return StoredObject(key, int(found["ContentLength"]), str(found.get("ETag", "")), marks, written)

    def _put(self, key: str, data: bytes, *, absent: bool, over: str) -> None:
        condition = {"IfNoneMatch": "*"} if absent else {"IfMatch": over} if over else {}
        self.call("put_object", Key=key, Body=data, ContentMD5=_md5(data), **condition)

    def delete(self, keys: Iterable[str]) -> None:
        left = sorted(set(keys))
        for at in range(0, len(left), DELETED_AT_ONCE):
            some = [{"Key": key} for key in left[at : at + DELETED_AT_ONCE]]
            wanted = {"Objects": some, "Quiet": True}
            found = self.ask(lambda wanted=wanted: self.call("delete_objects", Delete=wanted), self.root, writing=True)  # type: ignore[misc]
            for failed in found.get("Errors") or []:
                if failed.get("Code") != "NoSuchKey":
                    what = str(self.place(str(failed.get("Key"))))
                    raise OutputError(f"{what} could not be removed ({failed.get('Code')})", "check the permissions")

    def deletions(self, count: int) -> int:
        return -(-count // DELETED_AT_ONCE)

    def begin(self, key: str, marks: Mapping[str, str], work: Address) -> Assembly:
        found = self.ask(
            lambda: self.call("create_multipart_upload", Key=key, Metadata=dict(marks)), self.place(key), writing=True
        )
        with sense(self.place(key), _WHO):
            return _S3Assembly(self, key, str(found["UploadId"]))

    def resumed(self, key: str, id: str) -> Assembly:
        return _S3Assembly(self, key, id)

    def uploads(self, prefix: str) -> list[Begun]:
        found: list[Begun] = []
        marker: dict[str, Any] = {}
        while True:
            page = self.ask(
                lambda marker=marker: self.call("list_multipart_uploads", Prefix=prefix, **marker),  # type: ignore[misc]
                self.place(prefix) if prefix else self.root,
            )
            with sense(self.root, _WHO):
                found += [Begun(one["Key"], one["UploadId"], one["Initiated"]) for one in page.get("Uploads", [])]
                if not page.get("IsTruncated"):
                    return [one for one in found if one.key.startswith(prefix)]
                marker = _next(
                    marker, {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
                )

    def holds(self, address: Address) -> bool:
        return address.scheme == self.root.scheme

    def copies_to(self, other: Store) -> bool:
        return isinstance(other, S3) and other._made.endpoint == self._made.endpoint


class _S3Assembly(Assembly):
    def __init__(self, store: S3, key: str, id: str) -> None:
        self._store, self.key, self.id = store, key, id

    def put(self, number: int, data: bytes | bytearray) -> str:
        digest = _md5(data)
        what = self._store.place(self.key)

        def asked() -> str:
            found = self._store.call(
                "upload_part",
                Key=self.key,
                UploadId=self.id,
                PartNumber=number,
                Body=data,
                ContentMD5=digest,
            )
            meter.count(up=len(data))
            with sense(what, _WHO):
                return str(found["ETag"])

        try:
            return self._store.ask(asked, what, writing=True, pass_on=True)
        except Fault as fault:
            raise self._failed(fault, what) from None

    def _failed(self, fault: Fault, what: Address, *, writing: bool = True) -> AdapterkitError:
        """The error of a fault; an upload that was aborted under a run is another run's doing."""
        if fault.code != "NoSuchUpload":
            return told(fault, str(what), writing=writing)
        hint = "another run took its place, or its uploads were swept; run it again"
        return OutputError(f"the upload of {self._store.place(self.key)} is gone", hint)

    def copy(self, number: int, source: Address, etag: str, start: int, nbytes: int) -> str:
        same = {"CopySourceIfMatch": etag} if etag else {}

        def asked() -> str:
            found = self._store.call(
                "upload_part_copy",
                Key=self.key,
                UploadId=self.id,
                PartNumber=number,
                CopySource={"Bucket": source.bucket, "Key": source.key},
                CopySourceRange=f"bytes={start}-{start + nbytes - 1}",
                **same,
            )
            meter.count(inside=nbytes)
            with sense(source, _WHO):
                return str(found["CopyPartResult"]["ETag"])

        try:
            return self._store.ask(asked, source, writing=True, pass_on=True)
        except Fault as fault:
            raise self._failed(fault, source, writing=not fault.changed) from None

    def parts(self) -> dict[int, HeldPart] | None:
        found: dict[int, HeldPart] = {}
        marker: dict[str, Any] = {}
        while True:
            try:
                page = self._store.ask(
                    lambda marker=marker: self._store.call(  # type: ignore[misc]
                        "list_parts", Key=self.key, UploadId=self.id, **marker
                    ),
                    self._store.place(self.key),
                    pass_on=True,
                )
            except Fault as fault:
                if fault.missing and fault.code != "NoSuchBucket":
                    return None
                raise told(fault, str(self._store.place(self.key))) from None
            with sense(self._store.place(self.key), _WHO):
                found |= {
                    int(one["PartNumber"]): HeldPart(int(one["Size"]), str(one["ETag"]))
                    for one in page.get("Parts", [])
                }
                if not page.get("IsTruncated"):
                    return found
                marker = _next(marker, {"PartNumberMarker": page["NextPartNumberMarker"]})

    def complete(self, etags: Mapping[int, str], *, absent: bool) -> str | None:
        parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]

        def asked(conditional: bool) -> str | bool:
            given = {"Key": self.key, "UploadId": self.id, "MultipartUpload": {"Parts": parts}}
            try:
                condition = {"IfNoneMatch": "*"} if conditional else {}
                done = self._store.call("complete_multipart_upload", **given, **condition)
                with sense(self._store.place(self.key), _WHO):
                    return str(done["ETag"])
            except Fault as fault:
                if fault.missing and fault.code != "NoSuchBucket":
                    return False
                raise

        found = self._store.conditionally(asked, self.key, absent)
        return found if isinstance(found, str) else None

    def abort(self) -> None:
        try:
            self._store.ask(
                lambda: self._store.call("abort_multipart_upload", Key=self.key, UploadId=self.id),
                self._store.place(self.key),
                writing=True,
                pass_on=True,
            )
        except Fault as fault:
            if not fault.missing:
                raise told(fault, str(self._store.place(self.key)), writing=True) from None


def _next(before: Mapping[str, Any], marker: dict[str, Any]) -> dict[str, Any]:
    """Where the next page begins.

    Raises:
        ValueError: where this one began: such a list has no end.
    """
    if marker == before:
        raise ValueError(marker)
    return marker


def _md5(data: bytes | bytearray) -> str:
    """What a store holds a body against; no secret depends on it."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _said(error: Exception) -> str:
    name = type(error).__name__
    return "no answer in time" if "Timeout" in name else NO_CONNECTION if "Connect" in name else "the connection failed"
