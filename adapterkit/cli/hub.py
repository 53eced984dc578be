"""`adapterkit push`, `adapterkit pull`"""

from __future__ import annotations

import click

from adapterkit.cli.output import note, say, show_json, size


@click.command(name="push", short_help="Publish a version to the Hugging Face Hub, in one commit.")
@click.argument("ref")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse one that is public.")
@click.option("--tag", metavar="TAG", help="Set this tag to the commit.")
@click.option("--create-pr", is_flag=True, help="Propose it in a pull request.")
@click.option("--base-id", default="", metavar="ORG/NAME", help="The Hub id of the base, where the record has none.")
@click.option("--replace-card", is_flag=True, help="Do not keep the prose of the card on the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(
    ref: str,
    repo: str,
    private: bool,
    tag: str | None,
    create_pr: bool,
    base_id: str,
    replace_card: bool,
    as_json: bool,
) -> None:
    """Publish REF (a registry name or a folder) as ORG/NAME: weights, configs, tokenizer, record and a model card.

    Files come from an allow-list; links, secrets and paths of this machine are refused. Pushing again after a failure
    finishes the work. The token is that of HF_TOKEN, `hf auth login` or a trusted publisher (HF_OIDC_RESOURCE).

    Exits with 4 without the right token, 5 when the Hub fails or somebody else was faster, 6 when something may not be
    published.

    \b
    Example:
      adapterkit push my-adapter@prod my-org/my-adapter --private --tag v1
    """
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


@click.command(name="pull", short_help="Bring a repository from the Hugging Face Hub into the registry.")
@click.argument("repo", metavar="ORG/NAME[@REVISION]")
@click.option("--name", default="", help="The name to register it under; by default the repository's.")
@click.option("--ignore-record", is_flag=True, help="Do not use the repository's adapterkit.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(repo: str, name: str, ignore_record: bool, as_json: bool) -> None:
    """Register what ORG/NAME holds at a revision, which is resolved to a commit first; every byte is checked.

    Exits with 3 when bytes are not those of the commit, 4 without the right token, 5 when the Hub fails.

    \b
    Example:
      adapterkit pull my-org/my-adapter@v1
    """
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
