"""A kernel is asked for any rows, in any steps: blocks of the writer, slices of fused tensors, every second row of an
interleaved one. What it gives must not depend on what else was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_cases import Case, cases, make_net, save_base, train

from adapterkit.adapters.edits import adapter_edits
from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.names import Names
from adapterkit.checkpoint.open import open_checkpoint


def one_per_layer() -> list[Case]:
    first: dict[tuple[str, str], Case] = {}
    for case in cases():
        first.setdefault((case.method, case.kind), case)
    return list(first.values())


@pytest.mark.parametrize("case", one_per_layer(), ids=lambda case: f"{case.method}-{case.kind}")
def test_rows_do_not_depend_on_the_block(case: Case, tmp_path: Path) -> None:
    save_base(make_net(), tmp_path / "base")
    train(make_net(), case.config(), tmp_path / "adapter", case.noise)
    base = open_checkpoint(tmp_path / "base")
    edits = adapter_edits(load_adapter(tmp_path / "adapter"), Names(base.shapes, base.config), base.config)
    assert edits
    for edit in edits:
        weights = StoredWeights(edit.target, base.tensors)
        kernel = edit.change.load(weights)
        w, count = weights.whole(), weights.shape[0]
        whole = kernel.new(w, range(count))
        size = float(whole.abs().max())
        assert torch.equal(w, weights.whole())
        for rows in (range(1, count, 2), range(3, count - 1), range(2, count, 5), range(count - 1, count)):
            found = kernel.new(w[rows.start : rows.stop : rows.step], rows)
            assert (found - whole[rows.start : rows.stop : rows.step]).abs().max() <= 1e-6 * size
            parts = kernel.parts(rows)
            if parts is None:
                continue
            added = w[rows.start : rows.stop : rows.step].clone()
            for where, left, right, scale in parts:
                added[where] += scale * left @ right
            assert (added - whole[rows.start : rows.stop : rows.step]).abs().max() <= 2e-6 * size
