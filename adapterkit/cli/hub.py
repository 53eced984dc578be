"""`adapterkit push`, `adapterkit pull`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import note, say, show_json, size
from adapterkit.cli.paths import FILE
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from adapterkit.bucket.pull import BucketPulled
    from adapterkit.oci.pull import OciPulled

_OCI = "oci://"
_PLAIN = "Speak HTTP with an OCI registry; on the loopback interface that is done in any case."


def _in_store(repo: str) -> bool:
    """Whether a remote is an address of a store."""
    from adapterkit.places import address_of

    return address_of(repo) is not None


def _only(there: str, given: dict[str, object]) -> None:
    """
    Raises:
        UsageError: an option that belongs to the other kind of remote.
    """
    wrong = next((name for name, value in given.items() if value), "")
    if wrong:
        raise UsageError(f"--{wrong} is of {there}", "leave it out")


@click.command(name="push", short_help="Publish a version to the Hugging Face Hub, an OCI registry or a bucket.")
@click.argument("ref")
@click.argument("repo", metavar="ORG/NAME|oci://HOST/NAME:TAG|s3://BUCKET/FOLDER")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse one that is public.")
@click.option("--tag", metavar="TAG", help="The Hub: set this tag to the commit. Buckets: the tag to set (latest).")
@click.option("--create-pr", is_flag=True, help="Propose it in a pull request.")
@click.option("--base-id", default="", metavar="ORG/NAME", help="The Hub id of the base, where the record has none.")
@click.option("--replace-card", is_flag=True, help="Do not keep the prose of the card on the Hub.")
@click.option("--move-tag", is_flag=True, help="OCI, buckets: let a tag that means another version mean this one.")
@click.option(
    "--share-with",
    multiple=True,
    metavar="NAME",
    help="OCI: a repository there whose blobs may be used, as the base's.",
)
@click.option(
    "--sign",
    type=FILE,
    metavar="KEY",
    help="OCI: sign the artifact as cosign does, with this private key.",
)
@click.option("--plain-http", is_flag=True, help=_PLAIN)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(
    ref: str,
    repo: str,
    private: bool,
    tag: str | None,
    create_pr: bool,
    base_id: str,
    replace_card: bool,
    move_tag: bool,
    share_with: tuple[str, ...],
    sign: Path | None,
    plain_http: bool,
    as_json: bool,
) -> None:
    """Publish REF (a registry name or a folder) as ORG/NAME: weights, configs, tokenizer, record and a model card.

    Files come from an allow-list; links, secrets and paths of this machine are refused. Pushing again after a failure
    finishes the work. The token is that of HF_TOKEN, `hf auth login` or a trusted publisher (HF_OIDC_RESOURCE).

    With oci://HOST/NAME:TAG it becomes an artifact of the CNCF ModelPack specification, one layer for each file; the tag is set
    last. The login is that of `docker login`.

    With s3://BUCKET/FOLDER it becomes a folder of its own in FOLDER, which every verb reads as an adapter or a model; the tag
    (--tag, or latest) is set last.

    Exits with 1 when a tag would have to move, 4 without the right token, 5 when the remote fails or somebody else was faster,
    6 when something may not be published.

    \b
    Example:
      adapterkit push my-adapter@prod my-org/my-adapter --private --tag v1
      adapterkit push my-adapter@prod oci://registry.example.com/adapters/mine:v1
      adapterkit push my-adapter@prod s3://models/adapters/mine --tag v1
    """
    if _in_store(repo):
        _only("the Hub", {"private": private, "create-pr": create_pr, "replace-card": replace_card})
        _only("OCI registries", {"share-with": share_with, "sign": sign, "plain-http": plain_http})
        from adapterkit.bucket.push import push_bucket

        there = push_bucket(ref, repo, tag=tag, base_id=base_id, move_tag=move_tag)
        if as_json:
            show_json(there)
            return
        for text in (*there.notes, *([f"not published: {', '.join(there.left_out)}"] if there.left_out else [])):
            note(f"note: {text}")
        for path in there.uploaded:
            say(f"  {path}")
        sent = f"{len(there.uploaded)} files sent ({size(there.sent)})" if there.uploaded else "was there already"
        say(f"{there.address}: {there.folder}: {sent}{', tag set' if there.new else ''}")
        return
    if repo.startswith(_OCI):
        _only("the Hub", {"private": private, "tag": tag, "create-pr": create_pr, "replace-card": replace_card})
        from adapterkit.oci.push import push_oci

        done = push_oci(
            ref, repo, base_id=base_id, move_tag=move_tag, share_with=share_with, key=sign, plain_http=plain_http
        )
        if as_json:
            show_json(done)
            return
        for text in (*done.notes, *([f"not published: {', '.join(done.left_out)}"] if done.left_out else [])):
            note(f"note: {text}")
        for path in done.uploaded:
            say(f"  {path}")
        shared = f", {len(done.mounted) + len(done.kept)} there already" if done.mounted or done.kept else ""
        state = f"{len(done.uploaded)} files sent ({size(done.sent)}){shared}" if done.new else "was there already"
        say(f"{done.address}@sha256:{done.digest}: {state}{', signed' if done.signature else ''}")
        return
    _only("OCI registries", {"move-tag": move_tag, "share-with": share_with, "sign": sign, "plain-http": plain_http})
    from adapterkit.hub.push import push as verb

    found = verb(ref, repo, private=private, tag=tag, create_pr=create_pr, base_id=base_id, replace_card=replace_card)
    if as_json:
        show_json(found)
        return
    for text in found.notes:
        note(f"note: {text}")
    if found.left_out:
        note(f"note: not published: {', '.join(found.left_out)}")
    for path in found.uploaded:
        say(f"  {path}")
    state = f"{len(found.uploaded)} files" if found.new else "was there already"
    say(f"{found.pull_request or found.url}: {state}{f', tag {found.tag}' if found.tag else ''}")


def _pulled(done: OciPulled | BucketPulled, also: str, as_json: bool, more: dict[str, object]) -> None:
    """Say what a pull from an OCI registry or a bucket brought."""
    if as_json:
        show_json(
            {
                "ref": done.record.ref,
                "address": done.address,
                "new": done.new,
                "stored": done.stored,
                "left_out": list(done.left_out),
                **more,
                "record": done.record.to_json(),
            }
        )
        return
    if done.left_out:
        note(f"note: not fetched: {', '.join(done.left_out)}")
    state = f"{size(done.stored)} stored" if done.new else "was there already"
    say(f"{done.record.ref}: {done.address}, {len(done.record.files)} files; {state}{also}")


@click.command(name="pull", short_help="Bring a version from the Hub, an OCI registry or a bucket into the registry.")
@click.argument("repo", metavar="ORG/NAME[@REVISION]|oci://HOST/NAME:TAG|s3://BUCKET/FOLDER[@TAG]")
@click.option("--name", default="", help="The name to register it under; by default the repository's.")
@click.option("--ignore-record", is_flag=True, help="Do not use the repository's adapterkit.json.")
@click.option(
    "--verify",
    type=FILE,
    metavar="KEY",
    help="OCI: the artifact has to be signed for this public key.",
)
@click.option("--plain-http", is_flag=True, help=_PLAIN)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(repo: str, name: str, ignore_record: bool, verify: Path | None, plain_http: bool, as_json: bool) -> None:
    """Register what ORG/NAME holds at a revision, which is resolved to a commit first; every byte is checked.

    With oci://HOST/NAME:TAG (or @sha256:...) an artifact of an OCI registry; with s3://BUCKET/FOLDER@TAG (or @sha256:...) what
    push wrote there.

    Exits with 3 when bytes are not those of the commit or digest, or a signature does not hold; 4 without the right token,
    5 when the remote fails, 6 when a path would leave its folder, 7 when there is nothing.

    \b
    Example:
      adapterkit pull my-org/my-adapter@v1
      adapterkit pull oci://registry.example.com/adapters/mine:v1 --verify cosign.pub
      adapterkit pull s3://models/adapters/mine@v1
    """
    if _in_store(repo):
        _only("OCI registries", {"verify": verify, "plain-http": plain_http})
        from adapterkit.bucket.pull import pull_bucket

        _pulled(pull_bucket(repo, name=name, ignore_record=ignore_record), "", as_json, {})
        return
    if repo.startswith(_OCI):
        from adapterkit.oci.pull import pull_oci

        done = pull_oci(repo, name=name, ignore_record=ignore_record, key=verify, plain_http=plain_http)
        _pulled(done, ", signed as asked" if done.signed else "", as_json, {"signed": done.signed})
        return
    _only("OCI registries", {"verify": verify, "plain-http": plain_http})
    from adapterkit.hub.pull import pull as verb

    found = verb(repo, name=name, ignore_record=ignore_record)
    record = found.record
    if as_json:
        show_json(
            {
                "ref": record.ref,
                "repo": found.repo,
                "commit": found.commit,
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
    say(f"{record.ref}: {found.repo}@{found.commit[:7]}, {len(record.files)} files; {state}")
