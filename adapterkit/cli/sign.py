"""`adapterkit sign`, `adapterkit verify-signature`"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.output import say, show_json

_PATH = click.Path(path_type=Path)


@click.command(name="sign", short_help="Sign an output or a version with a key of your own.")
@click.argument("target", metavar="PATH|REF")
@click.option("--key", required=True, type=_PATH, help="The private key: an elliptic curve key in PEM form.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def sign(target: str, key: Path, as_json: bool) -> None:
    """Sign the files of an output (model.sig beside them) or of a registered version (a new version that carries it).

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
        show_json({"signature": str(made.signature), "ref": made.ref})
    elif made.ref:
        say(f"{made.ref} carries the signature; aliases stay where they are")
    else:
        say(str(made.signature))


@click.command(name="verify-signature", short_help="Say whether an output or a version is what was signed.")
@click.argument("target", metavar="PATH|REF")
@click.option("--key", required=True, type=_PATH, help="The public key, in PEM form.")
@click.option("--signature", type=_PATH, help="Where it lies, if not beside the files or in the version.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(target: str, key: Path, signature: Path | None, as_json: bool) -> None:
    """Read every byte of PATH or REF and hold it against its signature.

    Exits with 3 when a file was changed, added or is missing, or another key signed.

    \b
    Example:
      adapterkit verify-signature merged --key public.pem
    """
    from adapterkit.provenance.signing import verify as verb

    found = verb(target, key, signature=signature)
    if as_json:
        show_json({"target": found.target, "files": found.files})
    else:
        say(f"{found.target}: {found.files} files are as they were signed")
