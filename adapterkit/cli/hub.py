"""`adapterkit push`, `adapterkit pull`"""

from __future__ import annotations

from typing import Any

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import file_count, note, say, show_json, size
from adapterkit.places import BUCKET, HUB, OCI
from adapterkit.requests.publish import PullRequest, PushRequest


@command_of(
    PushRequest, name="push", short_help="Publish a version to the Hugging Face Hub, an OCI registry or a bucket."
)
def push(request: PushRequest, as_json: bool) -> None:
    """Publish REF (a registry name or a folder) as ORG/NAME: weights, configs, tokenizer, record and a model card.

    Files come from an allow-list; links, secrets and paths of this machine are refused. Pushing again after a failure
    finishes the work. The token is that of HF_TOKEN, `hf auth login` or a trusted publisher (HF_OIDC_RESOURCE).

    With oci://HOST/NAME:TAG it becomes an artifact of the CNCF ModelPack specification, one layer for each file; the tag is set
    last. The login is that of `docker login`.

    With s3://BUCKET/FOLDER (or gs://, az://, hf://buckets/) it becomes a folder of its own in FOLDER, which every verb
    reads as an adapter or a model; the tag (--tag, or latest) is set last.

    Exits with 1 when a tag would have to move, 4 without the right token, 5 when the remote fails or somebody else was faster,
    6 when something may not be published.

    \b
    Example:
      adapterkit push my-adapter@prod my-org/my-adapter --private --tag v1
      adapterkit push my-adapter@prod oci://registry.example.com/adapters/mine:v1
      adapterkit push my-adapter@prod s3://models/adapters/mine --tag v1
    """
    from adapterkit.verbs.publish import push as verb

    done = verb(**{name: getattr(request, name) for name in request.named})
    if as_json:
        show_json(done)
        return
    for text in (*done.notes, *([f"not published: {', '.join(done.left_out)}"] if done.left_out else [])):
        note(f"note: {text}")
    for path in done.uploaded:
        say(f"  {path}")
    say(_PUSHED[request.kind](done))


def _on_the_hub(done: Any) -> str:
    state = file_count(len(done.uploaded)) if done.new else "was there already"
    return f"{done.where}: {state}{f', tag {done.tag}' if done.tag else ''}"


def _in_oci(done: Any) -> str:
    shared = f", {len(done.mounted) + len(done.kept)} there already" if done.mounted or done.kept else ""
    state = f"{file_count(len(done.uploaded))} sent ({size(done.sent)}){shared}" if done.new else "was there already"
    return f"{done.where}: {state}{', signed' if done.signature else ''}"


def _in_a_bucket(done: Any) -> str:
    sent = f"{file_count(len(done.uploaded))} sent ({size(done.sent)})" if done.uploaded else "was there already"
    return f"{done.address}: {done.where}: {sent}{', tag set' if done.new else ''}"


_PUSHED = {HUB: _on_the_hub, OCI: _in_oci, BUCKET: _in_a_bucket}
# What a pull's JSON says of the remote.
_SHOWN = {HUB: ("repo", "commit"), OCI: ("address", "signed"), BUCKET: ("address",)}


@command_of(
    PullRequest, name="pull", short_help="Bring a version from the Hub, an OCI registry or a bucket into the registry."
)
def pull(request: PullRequest, as_json: bool) -> None:
    """Register what ORG/NAME holds at a revision, which is resolved to a commit first; every byte is checked.

    With oci://HOST/NAME:TAG (or @sha256:...) it takes an artifact of an OCI registry; with s3://BUCKET/FOLDER@TAG (or
    @sha256:...; gs://, az:// and hf://buckets/ too) what push wrote there.

    Exits with 3 when bytes are not those of the commit or digest, or a signature does not hold; 4 without the right token,
    5 when the remote fails, 6 when a path would leave its folder, 7 when there is nothing.

    \b
    Example:
      adapterkit pull my-org/my-adapter@v1
      adapterkit pull oci://registry.example.com/adapters/mine:v1 --verify cosign.pub
      adapterkit pull s3://models/adapters/mine@v1
    """
    from adapterkit.verbs.publish import pull as verb

    found: Any = verb(**{name: getattr(request, name) for name in request.named})
    record = found.record
    if as_json:
        show_json(
            {
                "ref": record.ref,
                **{name: getattr(found, name) for name in _SHOWN[request.kind]},
                "new": found.new,
                "stored": found.stored,
                "left_out": list(found.left_out),
                "record": record.to_json(),
            }
        )
        return
    if found.left_out:
        note(f"note: not fetched: {', '.join(found.left_out)}")
    state = f"{size(found.stored)} stored" if found.new else "was there already"
    where = f"{found.repo}@{found.commit[:7]}" if request.kind == HUB else found.address
    signed = ", signed as asked" if request.kind == OCI and found.signed else ""
    say(f"{record.ref}: {where}, {file_count(len(record.files))}; {state}{signed}")
