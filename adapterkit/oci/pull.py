"""`pull` from an OCI registry: an artifact becomes a version, with every byte held against the digests of its manifest."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import CheckFailed, NotFound
from adapterkit.hub.files import allowed
from adapterkit.hub.pull import pulling_folder
from adapterkit.oci.client import Manifest, OciRegistry
from adapterkit.oci.modelpack import META, ArtifactFile, files_of
from adapterkit.oci.reference import OciReference, parse_oci
from adapterkit.oci.signatures import verify_artifact
from adapterkit.registry.home import open_home
from adapterkit.registry.names import name_or_from
from adapterkit.registry.record import BESIDE, Record
from adapterkit.registry.register import register

PARALLEL = 4


@dataclass(frozen=True)
class OciPulled:
    """``record`` as registered; ``address`` with the digest; ``new`` is False when it was there; ``left_out`` was not fetched.

    ``signed`` says whether a signature was asked for and held.
    """

    record: Record
    address: str
    new: bool
    stored: int
    left_out: tuple[str, ...]
    signed: bool = False


def pull_oci(
    address: str,
    *,
    name: str = "",
    ignore_record: bool = False,
    key: Path | None = None,
    plain_http: bool = False,
    home: Path | None = None,
) -> OciPulled:
    """Register what an artifact holds.

    Args:
        address: ``oci://host/name[:tag][@sha256:digest]``.
        name: of the registry entry; by default the repository's.
        ignore_record: do not use the artifact's ``adapterkit.json``.
        key: a public key: the artifact has to be signed with its private one, as cosign does it.
        plain_http: speak HTTP; on the loopback interface that is done in any case.

    Raises:
        CheckFailed: other bytes than the digests say, no signature that holds, or a record that is about other files.
        UnsafeError: a path that leaves its folder, or is there twice.
        NotFound, AuthError, ServerError, UsageError, OutputError, RegistryError
    """
    at_ = parse_oci(address, plain=plain_http)
    name = name_or_from(name, at_.name.rpartition("/")[2], at_)
    registry = OciRegistry(at_)
    manifest = found_manifest(registry)
    if key is not None:
        verify_artifact(registry, manifest.digest, key)
    exact = OciReference(at_.host, at_.name, "", manifest.digest, at_.plain)
    files = files_of(manifest, str(at_))
    wanted = [file for file in files if allowed(file.path) or file.path == BESIDE]
    if not any(file.path.endswith((".safetensors", ".gguf")) for file in wanted):
        raise NotFound(f"{at_} holds no safetensors or GGUF weights", "check what was pushed there")
    at = open_home(home)
    at.create()
    folder = pulling_folder(at, sum(file.size for file in wanted), str(at_))
    try:
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda file: _fetch(registry, file, folder), wanted))
        found = register(folder, name, meta={META: str(exact)}, link=True, ignore_beside=ignore_record, home=home)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    left = tuple(sorted({file.path for file in files} - {file.path for file in wanted}))
    return OciPulled(found.record, str(exact), found.new, found.stored, left, key is not None)


def found_manifest(registry: OciRegistry) -> Manifest:
    """
    Raises:
        NotFound: there is no such artifact.
    """
    found = registry.manifest(registry.reference.pointer)
    if found is None:
        raise NotFound(f"{registry.reference} does not exist", "check the name, the tag, and whether a login is needed")
    return found


def _fetch(registry: OciRegistry, file: ArtifactFile, folder: Path) -> None:
    """One file into the folder.

    Raises:
        CheckFailed: its bytes are not those of its digest.
    """
    target = disk.open_new_inside(folder, file.path)
    try:
        total, digest = 0, hashlib.sha256()
        with disk.writing(file.path, folder), registry.blob(file.digest, file.size) as found:
            for block in found.blocks(file.size):
                digest.update(block)
                total += len(block)
                disk.write_all(target, block)
    finally:
        os.close(target)
    if total != file.size or digest.hexdigest() != file.digest:
        where = registry.reference.host
        raise CheckFailed(f"the bytes of {file.path} from {where} are not those of its digest", "pull it again")
