"""`adapterkit push`, `adapterkit pull`"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.output import note, say, show_json, size
from adapterkit.errors import UsageError

_OCI = "oci://"
_PLAIN = "Speak HTTP with an OCI registry; on the loopback interface that is done in any case."


def _only(there: str, given: dict[str, object]) -> None:
    """
    Raises:
        UsageError: an option that belongs to the other kind of remote.
    """
    wrong = next((name for name, value in given.items() if value), "")
    if wrong:
        raise UsageError(f"--{wrong} is of {there}", "leave it out")


@click.command(name="push", short_help="Publish a version to the Hugging Face Hub, or to an OCI registry.")
@click.argument("ref")
@click.argument("repo", metavar="ORG/NAME|oci://HOST/NAME:TAG")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse one that is public.")
@click.option("--tag", metavar="TAG", help="Set this tag to the commit.")
@click.option("--create-pr", is_flag=True, help="Propose it in a pull request.")
@click.option("--base-id", default="", metavar="ORG/NAME", help="The Hub id of the base, where the record has none.")
@click.option("--replace-card", is_flag=True, help="Do not keep the prose of the card on the Hub.")
@click.option("--move-tag", is_flag=True, help="OCI: let a tag that means another artifact mean this one.")
@click.option(
    "--share-with",
    multiple=True,
    metavar="NAME",
    help="OCI: a repository there whose blobs may be used, as the base's.",
)
@click.option(
    "--sign",
    type=click.Path(path_type=Path),
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

    Exits with 1 when a tag would have to move, 4 without the right token, 5 when the remote fails or somebody else was faster,
    6 when something may not be published.

    \b
    Example:
      adapterkit push my-adapter@prod my-org/my-adapter --private --tag v1
      adapterkit push my-adapter@prod oci://registry.example.com/adapters/mine:v1
    """
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


@click.command(name="pull", short_help="Bring a repository from the Hub, or an OCI artifact, into the registry.")
@click.argument("repo", metavar="ORG/NAME[@REVISION]|oci://HOST/NAME:TAG")
@click.option("--name", default="", help="The name to register it under; by default the repository's.")
@click.option("--ignore-record", is_flag=True, help="Do not use the repository's adapterkit.json.")
@click.option(
    "--verify",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="OCI: the artifact has to be signed for this public key.",
)
@click.option("--plain-http", is_flag=True, help=_PLAIN)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(repo: str, name: str, ignore_record: bool, verify: Path | None, plain_http: bool, as_json: bool) -> None:
    """Register what ORG/NAME holds at a revision, which is resolved to a commit first; every byte is checked.

    With oci://HOST/NAME:TAG (or @sha256:...) an artifact of an OCI registry.

    Exits with 3 when bytes are not those of the commit or digest, or a signature does not hold; 4 without the right token,
    5 when the remote fails, 6 when a path would leave its folder, 7 when there is nothing.

    \b
    Example:
      adapterkit pull my-org/my-adapter@v1
      adapterkit pull oci://registry.example.com/adapters/mine:v1 --verify cosign.pub
    """
    if repo.startswith(_OCI):
        from adapterkit.oci.pull import pull_oci

        done = pull_oci(repo, name=name, ignore_record=ignore_record, key=verify, plain_http=plain_http)
        if as_json:
            show_json(
                {
                    "ref": done.record.ref,
                    "address": done.address,
                    "new": done.new,
                    "stored": done.stored,
                    "left_out": list(done.left_out),
                    "signed": done.signed,
                    "record": done.record.to_json(),
                }
            )
            return
        if done.left_out:
            note(f"note: not fetched: {', '.join(done.left_out)}")
        state = f"{size(done.stored)} stored" if done.new else "was there already"
        signed = ", signed as asked" if done.signed else ""
        say(f"{done.record.ref}: {done.address}, {len(done.record.files)} files; {state}{signed}")
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
