"""`adapterkit sign`, `adapterkit verify-signature`, `adapterkit verify-attestation`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import note, say, show_json
from adapterkit.cli.paths import FILE, FILE_THERE, TARGET
from adapterkit.errors import counted

if TYPE_CHECKING:
    from adapterkit.places import Address

_PATH = FILE
_ignore = click.option(
    "--ignore", multiple=True, metavar="NAME", help="A file or folder in it that is not looked at, such as .git."
)


@click.command(name="sign", short_help="Sign an output or a version with a key of your own.")
@click.argument("target", metavar="PATH|REF", type=TARGET)
@click.option("--key", required=True, type=_PATH, help="The private key: an elliptic curve key in PEM form.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def sign(target: str | Address, key: Path, as_json: bool) -> None:
    """Sign the files of an output or of a registered version (a new version that carries the signature).

    model.sig covers every file, card and record included; adapterkit.intoto.jsonl holds the provenance and the record, with
    its evidence, as signed in-toto statements. A .git folder is left out.

    Works offline, by OpenSSF model-signing: pip install 'adapterkit[sign]'. The password of an encrypted key is taken
    from ADAPTERKIT_KEY_PASSWORD.

    \b
    Example:
      openssl ecparam -name prime256v1 -genkey -noout -out private.pem
      openssl ec -in private.pem -pubout -out public.pem
      adapterkit sign merged --key private.pem
    """
    from adapterkit.provenance.signing import sign as verb

    made = verb(target, key)
    if as_json:
        rows = {"signature": str(made.signature), "statements": str(made.statements), "ref": made.ref}
        show_json({**rows, "left_out": list(made.left_out)})
        return
    for name in made.left_out:
        note(f"note: {name} is not signed; verify-signature takes --ignore {name}")
    if made.ref:
        say(f"{made.ref} carries the signature; aliases stay where they are")
    else:
        say(str(made.signature))
        say(str(made.statements))


@click.command(name="verify-signature", short_help="Say whether an output or a version is what was signed.")
@click.argument("target", metavar="PATH|REF", type=TARGET)
@click.option("--key", required=True, type=_PATH, help="The public key, in PEM form.")
@click.option("--signature", type=FILE_THERE, help="Where it lies, if not beside the files or in the version.")
@_ignore
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(
    target: str | Address, key: Path, signature: Path | Address | None, ignore: tuple[str, ...], as_json: bool
) -> None:
    """Read every byte of PATH or REF and hold it against its signature, records and statements included.

    Exits with 3 when a file was changed, was added, is missing or was never signed, the record says something else than was
    signed, or another key signed.

    \b
    Example:
      adapterkit verify-signature merged --key public.pem
    """
    from adapterkit.provenance.signing import verify as verb

    found = verb(target, key, signature=signature, ignore=ignore)
    if as_json:
        show_json({"target": found.target, "files": found.files, "left_out": list(found.left_out)})
        return
    for name in found.left_out:
        note(f"note: {name} was not looked at")
    say(f"{found.target}: {counted(found.files, 'file is as it was signed', 'files are as they were signed')}")


@click.command(name="verify-attestation", short_help="Say whether signed statements about an output are true of it.")
@click.argument("target", metavar="PATH|REF", type=TARGET)
@click.option("--key", required=True, type=_PATH, help="The public key, in PEM form.")
@click.option("--attestation", type=FILE_THERE, help="DSSE envelopes or a Sigstore bundle from elsewhere.")
@_ignore
@click.option("--json", "as_json", is_flag=True, help="Print the statements as JSON.")
def attestation(
    target: str | Address, key: Path, attestation: Path | Address | None, ignore: tuple[str, ...], as_json: bool
) -> None:
    """Hold signed in-toto statements against the key, and against the files and the record of PATH or REF.

    Reads adapterkit.intoto.jsonl, which sign writes, or what other tools wrote. Exits with 3 when another key signed, a file
    that a statement names is missing or has other bytes, or the record says something else than was signed.

    \b
    Example:
      adapterkit verify-attestation merged --key public.pem
    """
    from adapterkit.provenance.attested import verify_attestation

    found = verify_attestation(target, key, attestation=attestation, ignore=ignore)
    if as_json:
        rows = [
            {"predicateType": one.predicate_type, "subjects": dict(one.subjects), "predicate": dict(one.predicate)}
            for one in found.statements
        ]
        show_json({"target": found.target, "statements": rows, "unnamed": list(found.unnamed)})
        return
    for one in found.statements:
        say(f"{one.words}; {counted(len(one.subjects), 'file')}")
    if found.unnamed:
        note(f"note: no statement names {', '.join(found.unnamed[:10])}{', ...' if len(found.unnamed) > 10 else ''}")
    held = counted(len(found.statements), "statement is", "statements are")
    say(f"{found.target}: {held} signed with this key, and true of what is there")
