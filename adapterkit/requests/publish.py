"""What `push` and `pull` are asked for: a version, a remote, and what that kind of remote can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from adapterkit.errors import UsageError, option
from adapterkit.places import BUCKET, HUB, OCI, remote_of
from adapterkit.requests.option import FLAG, INPUT, PATH, REF, InHome, Request, opt
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.requests.groups import Ref

_WORDS = {HUB: "the Hub", OCI: "OCI registries", BUCKET: "buckets"}
_HOME = opt("The registry's folder.", PATH, elsewhere={"cli": "$ADAPTERKIT_HOME", "recipe": "$ADAPTERKIT_HOME"})
_PLAIN = "OCI: speak HTTP; on the loopback interface that is done in any case."


class RemoteRequest(InHome, Request):
    """A request to a remote. `OF` says which kinds of remote an option is for; those not named there are for all."""

    OF: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    repo: str

    def check(self) -> None:
        """
        Raises:
            UsageError: an address that is no remote, or an option of another kind of remote.
        """
        super().check()
        kind = self.kind
        for name, value in self.given().items():
            kinds = self.OF.get(name, (kind,))
            if kind not in kinds:
                of = " and ".join(_WORDS[one] for one in kinds)
                value = value[0] if isinstance(value, tuple) else value  # of one that may be given again
                raise UsageError(f"{option(name, value)} is for {of}, and {self.repo} is not", "leave it out")

    @property
    def kind(self) -> str:
        """Which kind of remote it is: `HUB`, `OCI` or `BUCKET`."""
        return remote_of(self.repo)[0]

    @property
    def address(self) -> str:
        """The remote as its kind writes it: without ``hf://``, with ``oci://`` or the scheme of a store."""
        return remote_of(self.repo)[1]


@dataclass(frozen=True, eq=False, repr=False)
class PushRequest(RemoteRequest):
    """A version, or a folder, that is published at a remote."""

    VERB: ClassVar[str] = "push"
    OF: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "private": (HUB,),
        "tag": (HUB, BUCKET),
        "create_pr": (HUB,),
        "replace_card": (HUB,),
        "move_tag": (OCI, BUCKET),
        "share_with": (OCI,),
        "sign": (OCI,),
        "plain_http": (OCI,),
    }

    ref: Ref = field(metadata=opt("A registry name, or a folder.", REF, role=INPUT))
    repo: str = field(
        metadata=opt(
            "org/name on the Hub, oci://host/name:tag, or a folder of a bucket such as s3://bucket/folder.",
            role=INPUT, metavar="ORG/NAME|oci://HOST/NAME:TAG|s3://BUCKET/FOLDER", recipe="push.repo",
        )
    )  # fmt: skip
    private: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("The Hub: make a new repository private; refuse one that is public.", FLAG, recipe="push.private"),
    )
    tag: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The Hub: set this tag to the commit. Buckets: the tag to set (latest).", metavar="TAG", recipe="push.tag"
        ),
    )
    create_pr: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("The Hub: propose it in a pull request.", FLAG, recipe="push.create-pr"),
    )
    base_id: str = field(
        default="",
        kw_only=True,
        metadata=opt("The Hub id of the base, where the record has none.", metavar="ORG/NAME", recipe="push.base-id"),
    )
    replace_card: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("The Hub: do not keep the prose of the card there.", FLAG, recipe="push.replace-card"),
    )
    move_tag: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("OCI, buckets: let a tag that means another version mean this one.", FLAG, recipe="push.move-tag"),
    )
    share_with: Sequence[str] = field(
        default=(),
        kw_only=True,
        metadata=opt(
            "OCI: a repository there whose blobs may be used, as the base's; may be given again.",
            many=True, metavar="NAME", recipe="push.share-with",
        ),
    )  # fmt: skip
    sign: Path | str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "OCI: sign the artifact as cosign does, with this private key.", PATH,
            metavar="KEY", elsewhere={"recipe": "a recipe names no private key: push the version by hand"},
        ),
    )  # fmt: skip
    plain_http: bool = field(default=False, kw_only=True, metadata=opt(_PLAIN, FLAG, recipe="push.plain-http"))
    home: Ref | None = field(default=None, kw_only=True, metadata=_HOME)


@dataclass(frozen=True, eq=False, repr=False)
class PullRequest(RemoteRequest):
    """What a remote holds, as a version of the registry."""

    VERB: ClassVar[str] = "pull"
    OF: ClassVar[Mapping[str, tuple[str, ...]]] = {"verify": (OCI,), "plain_http": (OCI,)}

    repo: str = field(
        metadata=opt(
            "org/name[@revision] on the Hub, oci://host/name:tag, or a folder of a bucket such as s3://bucket/folder@tag.",
            role=INPUT, metavar="ORG/NAME[@REVISION]|oci://HOST/NAME:TAG|s3://BUCKET/FOLDER[@TAG]",
        )
    )  # fmt: skip
    name: str = field(
        default="",
        kw_only=True,
        metadata=opt("The name to register it under; by default the repository's."),
    )
    ignore_record: bool = field(
        default=False, kw_only=True, metadata=opt("Do not use the repository's adapterkit.json.", FLAG)
    )
    verify: Path | str | None = field(
        default=None,
        kw_only=True,
        metadata=opt("OCI: the artifact has to be signed for this public key.", PATH, metavar="KEY"),
    )
    plain_http: bool = field(default=False, kw_only=True, metadata=opt(_PLAIN, FLAG))
    home: Ref | None = field(default=None, kw_only=True, metadata=_HOME)
