"""What a base is called here: the name that it is registered under, for records that know it by its weights alone."""

from __future__ import annotations

from adapterkit.registry.index import Index
from adapterkit.registry.record import Record

_LEVELS = "('merkle', 'files', 'sampled', 'commit')"
# One record speaks for all with the same label, so a base with thousands of adapters costs no more than one.
_NAMES = f"""
    select one.base, min(b.name) from (select base, min(digest) as digest from records where base != '' group by base) one
    join levels l on l.digest = one.digest and l.own = 0 and l.level in {_LEVELS}
    join levels o on o.value = l.value and o.level = l.level and o.own = 1
    join records b on b.digest = o.digest and b.kind = 'base' and not b.hidden
    group by one.base"""


def registered_bases(found: Index) -> dict[str, str]:
    """The registered name of each base, by the label that records have for it; bases that are not registered are left
    out."""
    return dict(found.db.execute(_NAMES).fetchall())


def base_shown(record: Record, names: dict[str, str]) -> str:
    """What to call the base of a record: ``llama-1b (meta-llama/Llama-3.2-1B)``, as far as both are known."""
    if record.base is None:
        return ""
    label = record.base.label
    name = names.get(label, "")
    return f"{name} ({label})" if name and name != label else label
