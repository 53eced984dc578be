"""What goes next to an output, checked before the output is begun."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.publish import check_free, named_beside
from adapterkit.errors import UsageError, option
from adapterkit.places import Address
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.verbs.job import Beside


@dataclass(frozen=True)
class TowerFile:
    """A vision tower (mmproj) that is copied beside a GGUF output."""

    file: Path
    out: Path
    force: bool
    plan: Plan
    sources: Sequence[Source]

    def check(self) -> None:
        from adapterkit.gguf.projector import Projector

        Projector(self.file, self.out, force=self.force, plan=self.plan, sources=self.sources)

    def write(self) -> Sequence[str]:
        from adapterkit.gguf.projector import Projector

        Projector(self.file, self.out, force=True).copy()
        return ()

    def made(self) -> dict[Path, str] | None:
        return {self.out.parent / self.file.name: disk.hash_file(self.file)[0]}


@dataclass(frozen=True)
class ServerFile:
    """What loads a GGUF output in a server."""

    server: str
    out: Path
    source: Path | None
    force: bool

    def check(self) -> None:
        from adapterkit.serving.handover import file_of

        check_free(named_beside(self.out, file_of(self.server).suffix), force=self.force)

    def write(self) -> Sequence[str]:
        from adapterkit.serving.handover import write_handover

        found = write_handover(self.out, self.server, beside=self.source, force=self.force)
        return (*found.notes, f"{found.path} written; start it with: {found.start}")

    def made(self) -> dict[Path, str] | None:
        import hashlib  # what is imported here, a dry run imports

        from adapterkit.serving.handover import beside_model

        path, data, _ = beside_model(self.out, self.server, self.source)
        return {path: hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class Statement:
    """A provenance statement. Inputs on the Hub are named by the record."""

    out: Path
    inputs: tuple[str, ...]
    force: bool

    def check(self) -> None:
        from adapterkit.provenance.attest import NAME

        if self.out.suffix in (".gguf", ".safetensors"):  # in a folder nothing is before the folder is
            check_free(named_beside(self.out, NAME), force=self.force)

    def write(self) -> Sequence[str]:
        from adapterkit.provenance.attest import attest

        return (f"attested in {attest(self.out, self.inputs, strict=False).path}",)

    def made(self) -> dict[Path, str] | None:
        return None  # it says when it was made


def beside_of(
    request: Any,
    inputs: Iterable[object],
    *,
    source: Path | None = None,
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
    if isinstance(out, Address):
        for name in ("mmproj", "server", "attest"):
            if getattr(request, name, None) and not (name == "mmproj" and request.makes_tower):
                what = f"what {option(name, getattr(request, name))} makes lies beside an output on a disk"
                raise UsageError(f"{what}, and {out} is in a store", "leave it out, or write to a folder")
        return ()
    found: list[Beside] = []
    if getattr(request, "mmproj", None) is not None and not request.makes_tower:
        assert plan is not None
        found.append(TowerFile(Path(request.mmproj), out, request.force, plan, sources))
    if getattr(request, "server", None) is not None:
        found.append(ServerFile(request.server, out, source, request.force))
    if request.attest:
        here = [str(ref) for ref in inputs if ref is not None and (os.path.exists(str(ref)) or "/" not in str(ref))]
        found.append(Statement(out, tuple(here), request.force))
    return tuple(found)
