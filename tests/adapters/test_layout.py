"""Index maps against the operations of a real model loader (transformers), on numbered tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from adapterkit.adapters import layout as under_test
from adapterkit.adapters.layout import Layout, UnmappableError, lead_of, run, unrun, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 6, "moe_intermediate_size": 8}


def number(section: str | None, field: str) -> int:
    return HEADS[field]


def loader_ops(ops: Sequence[Sequence[Any]]) -> list[Any]:
    """The same operations as the loader's own objects."""
    from transformers import core_model_loading as loading

    made = []
    for name, *arguments in ops:
        if name == "stack":
            made.append(loading.MergeModulelist(dim=0))
        elif name == "cat":
            made.append(loading.Concatenate(dim=arguments[0]))
        elif name == "chunk":
            made.append(loading.Chunk(dim=arguments[0]))
        elif name == "deinterleave":
            made.append(loading.Interleave(dim=arguments[0]))
        elif name == "transpose":
            made.append(loading.Transpose(*arguments[:2]))
        elif name == "rope":
            made.append(loading.PermuteForRope(subconfig_key=arguments[0], permute_layer_names=arguments[1]))
        else:
            made.append(loading.ErnieFuseAndSplitTextVisionExperts())
    return made


CASES = {
    "experts": ([["stack"], ["cat", 1]], {"w1": [(3, 5)] * 4, "w3": [(3, 5)] * 4}, ["gate_up"]),
    "one list": ([["stack"]], {"w2": [(5, 3)] * 3}, ["down"]),
    "rows joined": ([["cat", 0]], {"q": [(4, 6)], "k": [(2, 6)], "v": [(2, 6)]}, ["conv1d"]),
    "convolutions joined": ([["cat", 0]], {"q": [(4, 1, 3)], "k": [(2, 1, 3)]}, ["conv1d"]),
    "stacks joined": ([["cat", 1]], {"gate": [(3, 4, 5)], "up": [(3, 4, 5)]}, ["gate_up"]),
    "fused split": ([["chunk", 0]], {"qkv": [(12, 5)]}, ["q", "k", "v"]),
    "fused bias split": ([["chunk", 0]], {"qkv": [(12,)]}, ["q", "k", "v"]),
    "uneven chunks": ([["chunk", 0]], {"qkv": [(11, 2)]}, ["q", "k", "v"]),
    "stack split": ([["deinterleave", 1], ["chunk", 1]], {"w13": [(3, 8, 5)]}, ["gate", "up"]),
    "interleaved rows": ([["deinterleave", 0]], {"w13": [(8, 5)]}, ["gate_up"]),
    "interleaved, split": ([["deinterleave", 0], ["chunk", 0]], {"w13": [(8, 5)]}, ["gate", "up"]),
    "interleaved stack": ([["deinterleave", 1]], {"w13": [(3, 8, 5)]}, ["gate_up"]),
    "rope": ([["rope", None, None]], {"wq": [(16, 5)]}, ["q"]),
    "rope bias": ([["rope", None, None]], {"wq": [(16,)]}, ["q"]),
    "fused rope": ([["chunk", 0], ["rope", None, ["q", "k"]]], {"wqkv": [(48, 5)]}, ["q", "k", "v"]),
    "transposed": ([["transpose", 0, 1, False]], {"gate": [(7, 4)]}, ["router"]),
    "transposed stack": ([["transpose", 1, 2, False]], {"experts": [(3, 7, 4)]}, ["down"]),
    "dealt": ([["deal"]], {"gate": [(3, 5)] * 6, "up": [(3, 5)] * 6}, ["text", "vision"]),
    "dealt, two sizes": (
        [["deal"]],
        {"gate": [(3, 5)] * 2 + [(4, 5)] * 2, "up": [(3, 5)] * 2 + [(4, 5)] * 2},
        ["a", "b"],
    ),
}


def assembled(layout: Layout, tensors: dict[str, Any]) -> Any:
    import torch

    columns = layout.shape[-1] if len(layout.shape) > layout.lead else 1
    columns *= 1 if layout.lead > 1 else max(1, *(1, *layout.shape[2:])) if len(layout.shape) <= 2 else 1
    columns = int(torch.Size(layout.shape[layout.lead :]).numel())
    made = torch.full((layout.rows, columns), -1.0)
    for piece in layout.pieces:
        stored = tensors[piece.tensor]
        rows = slice(piece.row, piece.row + piece.count)
        if piece.transposed:
            block = stored.reshape(-1, stored.shape[-1])[piece.at : piece.at + columns]
            made[rows] = block[:, piece.row_at : piece.row_at + piece.count].T
        else:
            made[rows] = stored.reshape(-1, columns)[piece.at :: piece.at_step][: piece.count]
    return made.reshape(layout.shape)


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_loader(case: str) -> None:
    import torch
    from transformers import PretrainedConfig

    ops, shapes, targets = CASES[case]
    tensors, start = {}, 0
    for key, group in shapes.items():
        for index, shape in enumerate(group):
            size = torch.Size(shape).numel()
            tensors[f"{key}:{index}"] = torch.arange(start, start + size, dtype=torch.float32).reshape(shape)
            start += size
    expected: Any = {key: [tensors[f"{key}:{i}"] for i in range(len(group))] for key, group in shapes.items()}
    for op in loader_ops(ops):
        config = PretrainedConfig(num_attention_heads=HEADS["num_attention_heads"])
        expected = op.convert(expected, source_patterns=list(shapes), target_patterns=targets, config=config)
    lead = lead_of(ops)[0]
    sources = [[whole(f"{key}:{i}", shape, lead) for i, shape in enumerate(group)] for key, group in shapes.items()]
    made = run(ops, sources, list(shapes), targets, number)
    for target, layout in zip(targets, made, strict=True):
        wanted = expected[target]
        wanted = wanted[0] if isinstance(wanted, list) else wanted
        assert layout.shape == tuple(wanted.shape)
        assert torch.equal(assembled(layout, tensors), wanted)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("rows joined", "convolutions joined", "uneven chunks")]
)
def test_source_shapes_from_what_was_made(case: str) -> None:
    ops, shapes, targets = CASES[case]
    lead = lead_of(ops)[0]
    sources = [[whole(f"{key}:{i}", shape, lead) for i, shape in enumerate(group)] for key, group in shapes.items()]
    made = [layout.shape for layout in run(ops, sources, list(shapes), targets, number)]
    groups = list(shapes.values())
    for target in range(len(targets)):
        place = target * len(groups[0]) // len(targets)
        assert unrun(ops, made, len(shapes), target) == groups[0][place]


def test_heads_split() -> None:
    sources = [[whole("att_proj", (8 * 3, 5), 1)]]
    made = run([["split", 0]], sources, ["att_proj"], ["q", "k", "v"], number)
    assert [(layout.shape, layout.pieces[0].at) for layout in made] == [((12, 5), 0), ((6, 5), 12), ((6, 5), 18)]


@pytest.mark.parametrize(
    ("shape", "target", "inner", "turned"),
    [((2, 16, 6), "gate_up_proj", 8, False), ((2, 6, 16), "gate_up_proj", 8, True),
     ((2, 6, 6), "gate_up_proj", 3, False),  # a square: it cannot be told, and the loader takes it as it is
     ((2, 6, 8), "down_proj", 8, False), ((2, 8, 6), "down_proj", 8, True)],
)  # fmt: skip
def test_transposed_only_where_the_file_is_not_as_the_module(shape: Any, target: str, inner: int, turned: bool) -> None:
    """The loader compares with the module's parameter, and we with the sizes in the config."""
    import torch
    from transformers import core_model_loading as loading

    hidden = HEADS["hidden_size"]
    parameter = torch.empty((2, 2 * inner, hidden) if target == "gate_up_proj" else (2, hidden, inner))
    stored = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    model = SimpleNamespace(get_parameter=lambda name: parameter)
    loader = loading.Transpose(1, 2, check_dims=True)
    wanted = loader.convert({"t": [stored]}, ["t"], [target], model=model, full_layer_name=target)[target]
    sizes = {**HEADS, "moe_intermediate_size": inner}
    (made,) = run([["transpose", 1, 2, True]], [[whole("t", shape, 2)]], ["t"], [target], lambda _, name: sizes[name])
    assert {piece.transposed for piece in made.pieces} == {turned}
    assert made.shape == tuple(wanted.shape)
    assert torch.equal(assembled(made, {"t": stored}), wanted)


@pytest.mark.parametrize(
    ("ops", "shapes"),
    [
        ([["stack"]], [[(3, 5), (4, 5)]]),
        ([["stack"]], [[(3,), (3,)]]),
        ([["stack"], ["cat", 1]], [[(3, 5)], [(3, 6)]]),
        ([["chunk", 0]], [[(2, 5)]]),
        ([["chunk", 1]], [[(6, 5)]]),
        ([["deinterleave", 0]], [[(7, 5)]]),
        ([["rope", None, None]], [[(12, 5)]]),
        ([["split", 0]], [[(9, 5)]]),
        ([["transpose", 1, 2, False]], [[(4, 5)]]),
        ([["transpose", 1, 2, False]], [[(under_test.MOST_BLOCKS + 1, 4, 5)]]),
        ([["unheard of"]], [[(4, 5)]]),
    ],
)
def test_what_does_not_fit_is_refused(ops: Any, shapes: Any) -> None:
    lead = lead_of(ops)[0] if ops[0][0] != "unheard of" else 1
    with pytest.raises((UnmappableError, IndexError)):
        sources = [[whole(f"{k}:{i}", shape, lead) for i, shape in enumerate(group)] for k, group in enumerate(shapes)]
        run(
            ops,
            sources,
            [str(k) for k in range(len(shapes))],
            ["a", "b", "c"] if ops[0][0] != "stack" else ["a"],
            number,
        )
