"""What a check is asked for: the options that decide whether a merge is possible, and a server to ask for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from typing import TYPE_CHECKING, ClassVar

from adapterkit.requests.groups import FLOAT_TYPES, OUTPUT, KeepOptions, Limits, OfAdapters, OntoBase, Ruled, Types
from adapterkit.requests.merge import FOLDER, GGUF, MergeRequest
from adapterkit.requests.option import BYTES, FLAG, INPUT, REF, opt
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.requests.groups import Adapters, Base

_OF_MERGE = {"recipe": "build --plan checks every output"}


def _servers() -> Iterable[str]:
    from adapterkit.serving.servers import servers

    return servers()


@dataclass(frozen=True, eq=False, repr=False)
class CheckRequest(OntoBase, OfAdapters, Ruled, Types, KeepOptions, Limits):
    """A check. It plans the merge that has these options, and refuses what that refuses."""

    VERB: ClassVar[str] = "check"

    base: Base = field(
        metadata=opt("The base: a folder, a safetensors or GGUF file, a registry name or a Hub id.", REF, role=INPUT)
    )
    adapters: Adapters = field(metadata=opt("The adapters, in order.", REF, role=INPUT, many=True))
    server: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Also say what this server would refuse or get wrong.",
            flag="--for", metavar="SERVER", choices=_servers, open=True, elsewhere=_OF_MERGE,
        ),
    )  # fmt: skip
    full: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Read every byte of BASE, where a record holds its strongest identity.", FLAG, elsewhere=_OF_MERGE
        ),
    )
    scan: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Also look into the change: spikes, layers and token rows that stand out, hidden parts, files that do not belong.",
            FLAG, elsewhere=_OF_MERGE,
        ),
    )  # fmt: skip
    to: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The form that will be written, folder or gguf; by default what the base is.",
            role=BYTES, group=OUTPUT, choices=(FOLDER, GGUF), elsewhere=_OF_MERGE,
        ),
    )  # fmt: skip
    dtype: str = field(
        default="auto",
        kw_only=True,
        metadata=opt(
            "The dtype that will be written.", role=BYTES, group=OUTPUT, choices=FLOAT_TYPES, elsewhere=_OF_MERGE
        ),
    )

    @property
    def given_adapters(self) -> tuple[object, ...]:
        """The adapters as a tuple."""
        assert isinstance(self.adapters, tuple)
        return self.adapters

    def merge(self, base: object, adapters: tuple[object, ...]) -> MergeRequest:
        """The merge that is checked, of what has been opened."""
        known = MergeRequest.options()
        given = {
            name: value for name, value in self.given().items() if name in known and name not in ("server", "base")
        }
        found = MergeRequest.bound({**given, "base": base, "adapters": adapters})
        assert isinstance(found, MergeRequest)
        return found
