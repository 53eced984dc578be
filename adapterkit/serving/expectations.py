"""What a server makes of an adapter and its base, from the server's row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from adapterkit.serving.features import FEATURES, largest_rank
from adapterkit.serving.server import MERGED, Expectation

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.serving.server import Server


def expected(server: Server, adapter: Adapter, base: Checkpoint) -> Iterator[tuple[str, Expectation]]:
    """Words for a feature that the adapter or its base has, and what the server does with it."""
    kind = str(base.config.get("model_type", ""))
    rows = [
        row
        for row in server.expectations
        if FEATURES[row.feature][1](adapter) and (not row.architectures or kind in row.architectures)
    ]
    # What is said of one architecture takes the place of what is said of all.
    special = {row.feature for row in rows if row.architectures}
    yield from ((FEATURES[row.feature][0], row) for row in rows if row.architectures or row.feature not in special)
    yield from _ranks(server, adapter)
    yield from _stored(server, base)


def _ranks(server: Server, adapter: Adapter) -> Iterator[tuple[str, Expectation]]:
    ranks, rank = server.ranks, largest_rank(adapter)
    if ranks is None or rank <= ranks.default:
        return
    if rank <= ranks.largest:
        says = f"{ranks.default} is the largest rank it loads unless told otherwise"
        fix = f"start it with {ranks.option} of at least the rank"
        row = Expectation(f"rank_{ranks.default}", "depends", says, ranks.source, fix)
        yield f"a rank above {ranks.default}", row
        return
    says = f"{ranks.largest} is the largest rank it can be started with"
    fix = f"bring it to a smaller one: adapterkit resize {{adapter}} --rank {ranks.largest} -o smaller"
    yield f"a rank above {ranks.largest}", Expectation(f"rank_{ranks.largest}", "refused", says, ranks.source, fix)


def _stored(server: Server, base: Checkpoint) -> Iterator[tuple[str, Expectation]]:
    """A quantized base in a form that the server's documentation does not list."""
    settings = base.config.get("quantization_config")
    method = str(settings.get("quant_method") or "") if isinstance(settings, Mapping) else ""
    if server.stored is None or not method or method in server.stored.methods:
        return
    says = f"its documentation lists {', '.join(server.stored.methods)}"
    row = Expectation("stored", "depends", says, server.stored.source, f"serve 16 bits, or one of these: {MERGED}")
    yield f"a base stored as {method}", row
