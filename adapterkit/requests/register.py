"""What a registration is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.errors import UsageError
from adapterkit.requests.option import FLAG, INPUT, PAIRS, PARAMETERS, PATH, REF, InHome, Request, opt
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.requests.groups import Ref

IDENTITY, RECORD = "Base", "Record"
_SAID = "said by the output itself"


@dataclass(frozen=True, eq=False, repr=False)
class RegisterRequest(InHome, Request):
    """A folder or file that becomes a version of a name."""

    VERB: ClassVar[str] = "register"

    path: Ref = field(
        metadata=opt("The folder or file. With --kind base also a Hub id, of which only the identity is kept.", REF,
                     role=INPUT)
    )  # fmt: skip
    name: str = field(
        metadata=opt("The name to register it under: a-z, 0-9, '.', '_' and '-'.", role=INPUT, flag="--name",
                     recipe="register.name")
    )  # fmt: skip
    base: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The base it was trained on or made from. It is identified by its weights.", REF,
            group=IDENTITY, metavar="REF", elsewhere={"recipe": "the base of the output"},
        ),
    )  # fmt: skip
    base_id: str = field(
        default="",
        kw_only=True,
        metadata=opt(
            "The Hub id of a base that is a local folder.",
            group=IDENTITY, metavar="ORG/NAME", recipe="register.base-id",
        ),
    )  # fmt: skip
    kind: str = field(
        default="",
        kw_only=True,
        metadata=opt(
            "adapter, merged, combined, quantized, converted or base; else what its record or config says.",
            group=RECORD, elsewhere={"recipe": _SAID},
        ),
    )  # fmt: skip
    method: str = field(
        default="",
        kw_only=True,
        metadata=opt(
            "How it was made, as lora or Q4_K_M; else what its config says.",
            group=RECORD, elsewhere={"recipe": _SAID},
        ),
    )  # fmt: skip
    meta: Mapping[str, str] | Sequence[str | tuple[str, str]] = field(
        default=(),
        kw_only=True,
        metadata=opt(
            "Free text to keep with it, as run, dataset, licence; may be given again.", PAIRS,
            group=RECORD, metavar="KEY=VALUE", recipe="register.meta",
        ),
    )  # fmt: skip
    full: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Read every byte of the base for the strongest identity.", FLAG,
            group=IDENTITY, elsewhere={"recipe": "full-record of the output hashes every byte"},
        ),
    )  # fmt: skip
    new_version: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Add a version even if nothing changed.", FLAG,
            group=RECORD, elsewhere={"recipe": "the same bytes are the same version"},
        ),
    )  # fmt: skip
    link: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Hard links instead of copies; the files become read-only.", FLAG,
            group=RECORD, elsewhere={"recipe": "an output is replaced by the next build"},
        ),
    )  # fmt: skip
    scan: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Look into an adapter's change first (see check --scan): warn of what stands out, refuse what has no place.",
            FLAG, group=RECORD, elsewhere={"recipe": "check looks into the adapters of a recipe"},
        ),
    )  # fmt: skip
    as_recipe: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Keep how it was made and not its large files, after making it again gave the same bytes.", FLAG,
            group=RECORD, elsewhere={"recipe": "the outputs of a recipe are kept where it says"},
        ),
    )  # fmt: skip
    ignore_record: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Do not use the adapterkit.json beside it.", FLAG,
            group=RECORD, elsewhere={"recipe": "the record is the recipe's own"},
        ),
    )  # fmt: skip
    evidence: Mapping[str, Any] = field(
        default_factory=dict,
        kw_only=True,
        metadata=opt(
            "Evidence by kind, beside what the record holds already.", PARAMETERS,
            elsewhere={"cli": "evidence has a verb of its own", "recipe": "what verify found"},
        ),
    )  # fmt: skip
    home: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The registry's folder.", PATH,
            elsewhere={"cli": "$ADAPTERKIT_HOME", "recipe": "$ADAPTERKIT_HOME"},
        ),
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.kind == "base":
            for name in ("base", "link", "ignore_record", "evidence", "as_recipe", "scan"):
                if name in self.given():
                    raise UsageError(f"{self.spelled(name)} does not apply to --kind base", "leave it out")

        for name in ("link", "ignore_record"):
            if self.as_recipe and name in self.given():
                raise UsageError(f"{self.spelled(name)} does not go with {self.spelled('as_recipe')}", "leave it out")

    @property
    def texts(self) -> dict[str, str]:
        """The free text by key."""
        return dict(self.meta)  # type: ignore[arg-type]
