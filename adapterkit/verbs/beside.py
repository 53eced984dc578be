"""What goes next to an output, checked before the output is begun."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.publish import check_free, named_beside
from adapterkit.places import Address, address_of
from adapterkit.stores.files import brought, check_absent, reading
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.verbs.job import Beside


@dataclass(frozen=True)
class TowerFile:
    """A vision tower (mmproj) that is copied beside a GGUF output."""

    file: Path | Address
    out: Path | Address
    force: bool
    plan: Plan
    sources: Sequence[Source]

    @property
    def _is_there(self) -> bool:
        """Whether it lies beside the output already, in a store; of files here `Projector` sees it."""
        return isinstance(self.out, Address) and self.file == self.out.with_name(self.file.name)

    def check(self) -> None:
        from adapterkit.gguf.projector import Projector

        with reading(self.file) as file:
            Projector(file, self.out, force=self.force or self._is_there, plan=self.plan, sources=self.sources)

    def write(self) -> Sequence[str]:
        from adapterkit.gguf.projector import Projector

        if self._is_there:
            return ()
        # Whether a file here may be replaced was decided when the run began.
        Projector(brought(self.file), self.out, force=self.force or isinstance(self.out, Path)).copy()
        return ()

    def made(self) -> dict[Path, str] | None:
        if isinstance(self.out, Address):
            return None
        return {self.out.parent / self.file.name: disk.hash_file(brought(self.file))[0]}


@dataclass(frozen=True)
class ServerFile:
    """What loads a GGUF output in a server."""

    server: str
    out: Path | Address
    source: Path | Address | None
    force: bool

    def check(self) -> None:
        from adapterkit.serving.handover import file_of

        check_beside_free(self.out, file_of(self.server).suffix, force=self.force)

    def write(self) -> Sequence[str]:
        from adapterkit.serving.handover import write_handover

        found = write_handover(self.out, self.server, beside=self.source, force=self.force)
        return (*found.notes, f"{found.path} written; start it with: {found.start}")

    def made(self) -> dict[Path, str] | None:
        import hashlib  # what is imported here, a dry run imports

        from adapterkit.serving.handover import beside_model

        if isinstance(self.out, Address):
            return None
        path, data, _ = beside_model(self.out, self.server, self.source)
        assert isinstance(path, Path)
        return {path: hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class Statement:
    """A provenance statement. Inputs on the Hub are named by the record."""

    out: Path | Address
    inputs: tuple[str, ...]
    force: bool

    def check(self) -> None:
        from adapterkit.provenance.attest import NAME

        if self.out.suffix in (".gguf", ".safetensors"):  # in a folder nothing is before the folder is
            check_beside_free(self.out, NAME, force=self.force)

    def write(self) -> Sequence[str]:
        from adapterkit.provenance.attest import attest

        return (f"attested in {attest(_reference(self.out), self.inputs, strict=False).path}",)

    def made(self) -> dict[Path, str] | None:
        return None  # it says when it was made


def beside_of(
    request: Any,
    inputs: Iterable[object],
    *,
    source: Path | Address | None = None,
    plan: Plan | None = None,
    sources: Sequence[Source] = (),
) -> tuple[Beside, ...]:
    """What a request asks for next to its output.

    Args:
        inputs: what the output is made from, for the statement.
        source: a folder with the model's ``generation_config.json``.
        plan, sources: of the output, where that may be a GGUF file.
    """
    out = request.target
    if out is None:
        return ()
    found: list[Beside] = []
    if getattr(request, "mmproj", None) is not None and not request.makes_tower:
        assert plan is not None
        found.append(TowerFile(request.mmproj, out, request.force, plan, sources))
    if getattr(request, "server", None) is not None:
        found.append(ServerFile(request.server, out, source, request.force))
    if request.attest:
        named = [str(ref) for ref in inputs if ref is not None]
        here = [ref for ref in named if os.path.exists(ref) or "/" not in ref or address_of(ref) is not None]
        found.append(Statement(out, tuple(here), request.force))
    return tuple(found)


def check_beside_free(out: Path | Address, name: str, *, force: bool) -> None:
    """Refuse a file that would be replaced beside an output that is a file.

    Raises:
        OutputError, AuthError, StoreError
    """
    if isinstance(out, Address):
        check_absent(out.with_name(f"{out.name}.{name}"), force=force)
    else:
        check_free(named_beside(out, name), force=force)


def _reference(place: Path | Address) -> Path | str:
    return str(place) if isinstance(place, Address) else place
