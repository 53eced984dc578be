"""`push` and `pull`: to and from the Hub, an OCI registry or a bucket, whichever the address names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.places import BUCKET, OCI
from adapterkit.requests.call import takes
from adapterkit.requests.publish import PullRequest, PushRequest

if TYPE_CHECKING:
    from adapterkit.bucket.pull import BucketPulled
    from adapterkit.bucket.push import BucketPushed
    from adapterkit.hub.pull import Pulled
    from adapterkit.hub.push import Pushed
    from adapterkit.oci.pull import OciPulled
    from adapterkit.oci.push import OciPushed


@takes(PushRequest)
def push(request: PushRequest) -> Pushed | OciPushed | BucketPushed:
    """Publish a version, or a folder: weights, configs, tokenizer, record and a model card.

    Files come from an allow-list; links, secrets and paths of this machine are refused. Pushing again after a failure finishes
    the work. What it gives is of the kind of the remote.

    Raises:
        UsageError: an address that is no remote, or an option of another kind of remote.
        UnsafeError: a link, a secret, a path of this machine, or a public repository where ``private`` was asked for.
        OutputError: the tag means something else.
        AuthError, HubError, ServerError, StoreError: the remote said no, failed, or somebody else was faster.
        NotFound, RegistryError, CheckFailed
    """
    given: dict[str, Any] = {"base_id": request.base_id, "home": request.folder}
    ref = str(request.ref)
    if request.kind == BUCKET:
        from adapterkit.bucket.push import push_bucket

        return push_bucket(ref, request.address, tag=request.tag, move_tag=request.move_tag, **given)
    if request.kind == OCI:
        from adapterkit.oci.push import push_oci

        return push_oci(
            ref,
            request.address,
            move_tag=request.move_tag,
            share_with=tuple(request.share_with),
            key=None if request.sign is None else Path(request.sign),
            plain_http=request.plain_http,
            **given,
        )
    from adapterkit.hub.push import push as push_hub

    return push_hub(
        ref,
        request.address,
        private=request.private,
        tag=request.tag,
        create_pr=request.create_pr,
        replace_card=request.replace_card,
        **given,
    )


@takes(PullRequest)
def pull(request: PullRequest) -> Pulled | OciPulled | BucketPulled:
    """Register what a remote holds; every byte is checked against the remote's digests and the record.

    Raises:
        UsageError: an address that is no remote, or an option of another kind of remote.
        CheckFailed: other bytes than the digests say, a record that is about other files, or a signature that does not hold.
        UnsafeError: a path that leaves its folder, or is there twice.
        AuthError, HubError, ServerError, StoreError, NotFound, OutputError, RegistryError
    """
    given: dict[str, Any] = {
        "name": request.name,
        "ignore_record": request.ignore_record,
        "home": request.folder,
    }
    if request.kind == BUCKET:
        from adapterkit.bucket.pull import pull_bucket

        return pull_bucket(request.address, **given)
    if request.kind == OCI:
        from adapterkit.oci.pull import pull_oci

        key = None if request.verify is None else Path(request.verify)
        return pull_oci(request.address, key=key, plain_http=request.plain_http, **given)
    from adapterkit.hub.pull import pull as pull_hub

    return pull_hub(request.address, **given)
