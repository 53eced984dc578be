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


def base_names(found: Index) -> dict[str, str]:
    """One name for each base, by the label in a row's ``base`` (or the digest of a base's own record).

    Labels of the same weights or the same Hub id are one base, and so is a model that was itself made on it. A Hub id is
    the name if there is one, else the name under which the base is registered, else a digest.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    ids: dict[str, str] = {}
    for label, repo in found.db.execute("select distinct base, base_id from records where base != ''"):
        parent[root(label)] = root(f"id {repo}") if repo else root(label)
        ids[label] = repo
    of_base = f"""select distinct r.base, l.value from records r join levels l on l.digest = r.digest
                  where l.own = 0 and l.level in {_LEVELS}"""
    for label, value in found.db.execute(of_base):
        parent[root(label)] = root(value)
    own = f"""select r.digest, r.name, r.kind, r.base, l.value from records r join levels l on l.digest = r.digest
              where l.own = 1 and l.level in {_LEVELS}"""
    registered: dict[str, str] = {}
    for digest, name, kind, label, value in found.db.execute(own):
        if kind == "base":
            parent[root(digest)] = root(value)
            registered[digest] = name
        elif label:  # what was made of a merged model belongs to the base of that model
            parent[root(value)] = root(label)
    best: dict[str, tuple[int, str]] = {}
    for label, repo in ids.items():
        best[root(label)] = min(best.get(root(label), (9, "")), (0, repo) if repo else (2, label))
    for digest, name in registered.items():
        best[root(digest)] = min(best.get(root(digest), (9, "")), (1, name))
    return {key: best[root(key)][1] for key in (*ids, *registered)}
