"""Expected types: llama.cpp's own snapshots (tests/snapshots of its repository, made by llama_quant_compute_types),
condensed to one line per kind of tensor, and cases derived by hand from llama-quant.cpp where they have none."""

from __future__ import annotations

from typing import Any

import gguf
import pytest

from adapterkit.errors import UsageError
from adapterkit.gguf.filetypes import FILE_TYPES, file_type
from adapterkit.gguf.mixes import choose_types, needs_importance, quantizable

Tensor = tuple[str, tuple[int, ...], str]
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def model(layers: int, tied: bool = False, suffix: str = "", experts: int = 0, columns: int = 1024) -> list[Tensor]:
    found: list[Tensor] = [("token_embd.weight", (5000, columns), "BF16"), ("output_norm.weight", (columns,), "F32")]
    if not tied:
        found.append(("output.weight", (5000, columns), "BF16"))
    for i in range(layers):
        found.append((f"blk.{i}.attn_norm.weight", (columns,), "F32"))
        for part in PARTS:
            stack = part.startswith("ffn") and experts
            name = f"blk.{i}.{part}{suffix if stack else ''}.weight"
            found.append((name, (experts, 512, 1024) if stack else (512, 1024), "BF16"))
    return found


def condensed(chosen: dict[str, str], layers: int, default: str) -> dict[str, Any]:
    """What differs from the default: a type, or (type, layers)... when the layers differ."""
    found: dict[str, Any] = {}
    for name in ("output", "token_embd"):
        if chosen.get(f"{name}.weight", default) != default:
            found[name] = chosen[f"{name}.weight"]
    parts = {name.split(".", 2)[2].removesuffix(".weight") for name in chosen if name.startswith("blk.")}
    for part in sorted(parts - {"attn_norm"}):
        types = [chosen[f"blk.{i}.{part}.weight"] for i in range(layers)]
        if set(types) == {default}:
            continue
        if len(set(types)) == 1:
            found[part] = types[0]
        else:
            others = sorted(set(types) - {default})
            found[part] = {kind: [i for i in range(layers) if types[i] == kind] for kind in others}
    return found


MORE = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
EACH = list(range(28))
QWEN3 = {  # qwen3-0.6b.schema: 28 layers, 16 heads, 8 of them for keys and values, an output matrix of its own
    "F32": {},
    "F16": {},
    "BF16": {},
    "Q4_0": {"output": "Q6_K"},
    "Q4_1": {"output": "Q6_K"},
    "Q5_0": {"output": "Q6_K"},
    "Q5_1": {"output": "Q6_K"},
    "Q8_0": {},
    "Q2_K": {"output": "Q6_K", "attn_output": "Q3_K", "attn_v": "Q3_K", "ffn_down": "Q3_K"},
    "Q2_K_S": {"output": "Q6_K", "ffn_down": {"Q4_K": [0, 1, 2]}},
    "Q3_K_S": {"output": "Q6_K"},
    "Q3_K_M": {
        "output": "Q6_K",
        "attn_output": "Q4_K",
        "attn_v": {"Q4_K": EACH[2:], "Q5_K": [0, 1]},
        "ffn_down": {"Q4_K": EACH[1:], "Q5_K": [0]},
    },
    "Q3_K_L": {"output": "Q6_K", "attn_output": "Q5_K", "attn_v": "Q5_K", "ffn_down": "Q5_K"},
    "Q4_K_S": {"output": "Q6_K", "attn_v": {"Q5_K": [0, 1, 2, 3]}, "ffn_down": {"Q5_K": [0, 1, 2]}},
    "Q4_K_M": {"output": "Q6_K", "attn_v": {"Q6_K": MORE}, "ffn_down": {"Q6_K": MORE}},
    "Q5_K_S": {"output": "Q6_K"},
    "Q5_K_M": {"output": "Q6_K", "attn_v": {"Q6_K": MORE}, "ffn_down": {"Q6_K": MORE}},
    "Q6_K": {},
    "IQ2_XXS": {"output": "Q5_K", "token_embd": "Q2_K", "attn_v": "Q2_K", "ffn_down": {"Q2_K": [0, 1, 2]}},
    "IQ2_XS": {"output": "Q5_K", "token_embd": "Q2_K", "attn_v": "Q2_K", "ffn_down": {"Q2_K": [0, 1, 2]}},
    "IQ3_XS": {
        "output": "Q6_K",
        "attn_k": "IQ3_XXS",
        "attn_q": "IQ3_XXS",
        "ffn_gate": {"IQ3_XXS": EACH[3:24]},
        "ffn_up": {"IQ3_XXS": EACH[3:24]},
    },
    "IQ3_XXS": {
        "output": "Q5_K",
        "token_embd": "IQ3_S",
        "attn_k": "IQ2_S",
        "attn_output": "IQ3_S",
        "attn_q": "IQ2_S",
        "attn_v": "IQ3_S",
        "ffn_down": {"Q3_K": EACH[3:], "Q4_K": [0, 1, 2]},
    },
    "IQ1_S": {
        "output": "Q5_K",
        "token_embd": "Q2_K",
        "attn_output": "IQ2_XXS",
        "attn_v": "Q2_K",
        "ffn_down": {"Q2_K": [0, 1, 2]},
    },
    "IQ4_NL": {"output": "Q6_K", "ffn_down": {"Q5_K": [0, 1, 2]}},
    "IQ3_S": {"output": "Q6_K"},
    "IQ3_M": {"output": "Q6_K", "attn_output": "Q4_K", "attn_v": "Q4_K", "ffn_down": {"Q4_K": [0, 1, 2]}},
    "IQ2_S": {
        "output": "Q5_K",
        "token_embd": "IQ3_S",
        "attn_output": "IQ3_S",
        "attn_v": "IQ3_S",
        "ffn_down": {"IQ3_S": [0, 1, 2]},
    },
    "IQ4_XS": {"output": "Q6_K", "ffn_down": {"Q5_K": [0, 1, 2]}},
    "TQ1_0": {"output": "Q6_K", "token_embd": "Q4_K"},
    "TQ2_0": {"output": "Q6_K", "token_embd": "Q4_K"},
    # The snapshots end before these two; by the rules of llama-quant.cpp.
    "Q1_0": {"output": "Q6_K"},
    "Q2_0": {"output": "Q6_K", "token_embd": "Q4_K"},
    "MXFP4_MOE": {"output": "Q8_0", "token_embd": "Q8_0", **dict.fromkeys(PARTS, "Q8_0")},
}
QWEN3["IQ2_M"] = QWEN3["IQ2_S"]
QWEN3["IQ1_M"] = QWEN3["IQ1_S"]


@pytest.mark.parametrize("ftype", FILE_TYPES)
def test_a_small_model_as_in_llama_cpp_s_snapshot(ftype: str) -> None:
    hparams = {"n_layer": 28, "n_head": 16, "n_head_kv": 8}
    chosen = choose_types(model(28), ftype, "qwen3", hparams)
    assert condensed(chosen, 28, FILE_TYPES[ftype].default) == QWEN3[ftype]
    assert chosen["blk.0.attn_norm.weight"] == "F32"


LLAMA_70B = {  # meta-llama-3.1-70b-instruct.schema: 80 layers, 64 heads, 8 for keys and values
    "Q2_K": {"output": "Q6_K", "attn_output": "Q3_K", "attn_v": "Q5_K", "ffn_down": "Q3_K"},
    "Q3_K_S": {"output": "Q6_K", "attn_v": "Q5_K"},
    "Q3_K_M": {
        "output": "Q6_K",
        "attn_output": "Q4_K",
        "attn_v": "Q5_K",
        "ffn_down": {"Q4_K": list(range(5, 80)), "Q5_K": [0, 1, 2, 3, 4]},
    },
}


@pytest.mark.parametrize("ftype", LLAMA_70B)
def test_the_70b_model(ftype: str) -> None:
    chosen = choose_types(model(80), ftype, "llama", {"n_layer": 80, "n_head": 64, "n_head_kv": 8})
    assert condensed(chosen, 80, FILE_TYPES[ftype].default) == LLAMA_70B[ftype]


BOTH = [0, 1, 2, 3, *range(6, 31, 3), 31, 32, 33, 34, 35]
GPT_OSS = {  # gpt-oss-120b.schema: 36 layers, 128 experts, 64 heads, 8 for keys and values, embeddings of 2880
    "Q2_K": {"output": "Q8_0", "attn_output": "Q3_K", "attn_v": "Q4_K", "ffn_down_exps": "Q3_K"},
    "Q3_K_M": {
        "output": "Q8_0",
        "attn_output": "Q4_K",
        "attn_v": {"Q4_K": list(range(2, 36)), "Q5_K": [0, 1]},
        "ffn_down_exps": {"Q4_K": list(range(2, 36)), "Q5_K": [0, 1]},
    },
    "Q4_K_S": {"output": "Q8_0", "attn_v": {"Q5_K": [0, 1, 2, 3]}, "ffn_down_exps": {"Q5_K": [0, 1, 2, 3]}},
    "Q4_K_M": {"output": "Q8_0", "attn_v": {"Q6_K": BOTH}, "ffn_down_exps": {"Q6_K": BOTH}},
    "Q2_K_S": {"output": "Q8_0", "attn_v": "Q4_K", "ffn_down_exps": {"Q4_K": [0, 1, 2, 3]}},
    "IQ2_XXS": {"output": "Q8_0", "token_embd": "Q2_K", "attn_v": "Q4_K", "ffn_down_exps": {"Q2_K": [0, 1, 2, 3]}},
}
FALLBACK_OF_EMBEDDINGS = {"Q2_K": "Q4_0", "Q3_K_M": "Q4_0", "Q4_K_S": "Q5_0", "Q4_K_M": "Q5_0", "Q2_K_S": "Q4_0"}


@pytest.mark.parametrize("ftype", GPT_OSS)
def test_a_model_of_many_experts(ftype: str) -> None:
    tensors = model(36, suffix="_exps", experts=128, columns=2880)
    chosen = choose_types(tensors, ftype, "gpt-oss", {"n_layer": 36, "n_expert": 128, "n_head": 64, "n_head_kv": 8})
    wanted = dict(GPT_OSS[ftype])
    wanted["token_embd"] = FALLBACK_OF_EMBEDDINGS.get(ftype, "Q4_0")  # rows of 2880 are no multiple of 256
    assert condensed(chosen, 36, FILE_TYPES[ftype].default) == wanted


def test_dense_first_layers_and_shared_experts() -> None:
    """deepseek-v3.1.schema, Q3_K_M: 61 layers, the first three dense; the layer is read from the name."""
    names = [f"blk.{i}.ffn_down.weight" for i in range(3)]
    names += [f"blk.{i}.ffn_down_{kind}.weight" for i in range(3, 61) for kind in ("exps", "shexp")]
    tensors = [(name, (256, 512, 1024) if "exps" in name else (512, 1024), "BF16") for name in names]
    chosen = choose_types(
        tensors, "Q3_K_M", "deepseek2", {"n_layer": 61, "n_expert": 256, "n_head": 128, "n_head_kv": 1}
    )
    assert [chosen[name] for name in names] == ["Q5_K"] * 3 + ["Q4_K"] * 116
    with pytest.raises(UsageError, match=r"blk\.61\.ffn_down_exps\.weight has no layer number below 61"):
        choose_types(
            [("blk.61.ffn_down_exps.weight", (2, 2, 256), "F16")], "Q4_K_M", "x", {"n_layer": 61, "n_expert": 2}
        )


def test_eight_experts() -> None:
    """By hand: Mixtral has Q8_0 for attn_k and attn_v, Q5_K for attn_output; 32 // 8 = 4 layers come first."""
    tensors = model(32, suffix="_exps", experts=8)
    chosen = choose_types(tensors, "Q4_K_M", "llama", {"n_layer": 32, "n_expert": 8, "n_head": 32, "n_head_kv": 8})
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert condensed(chosen, 32, "Q4_K") == {
        "output": "Q6_K",
        "attn_k": "Q8_0",
        "attn_v": "Q8_0",
        "attn_output": "Q5_K",
        "ffn_down_exps": {"Q6_K": more},
    }


def test_tied_embeddings_are_the_output() -> None:
    hparams = {"n_layer": 4, "n_head": 8, "n_head_kv": 8}
    assert choose_types(model(4, tied=True), "Q4_K_M", "llama", hparams)["token_embd.weight"] == "Q6_K"
    assert choose_types(model(4), "Q4_K_M", "llama", hparams)["token_embd.weight"] == "Q4_K"
    chosen = choose_types(model(4, tied=True), "Q4_K_M", "llama", hparams, output_type="q8_0")
    assert chosen["token_embd.weight"] == "Q8_0"


def test_falcon() -> None:
    chosen = choose_types(model(32), "Q4_K_M", "falcon", {"n_layer": 32, "n_head": 71, "n_head_kv": 1})
    assert chosen["output.weight"] == "Q8_0"
    assert [chosen[f"blk.{i}.ffn_down.weight"] for i in (0, 1, 2, 4, 6, 31)] == [
        "Q6_K",
        "Q6_K",
        "Q5_K",
        "Q4_K",
        "Q5_K",
        "Q5_K",
    ]
    chosen = choose_types(model(32), "Q3_K_L", "falcon", {"n_layer": 32, "n_head": 71, "n_head_kv": 1})
    assert chosen["blk.5.attn_output.weight"] == chosen["blk.5.ffn_down.weight"] == "Q4_K"


def test_an_importance_matrix_changes_some_rules() -> None:
    hparams = {"n_layer": 16, "n_head": 8, "n_head_kv": [8] * 16}
    plain = choose_types(model(16), "Q4_0", "llama", hparams)
    with_matrix = choose_types(model(16), "Q4_0", "llama", hparams, has_imatrix=True)
    assert {name for name in plain if plain[name] != with_matrix[name]} == {f"blk.{i}.ffn_down.weight" for i in (0, 1)}
    assert with_matrix["blk.1.ffn_down.weight"] == "Q4_1"
    low = choose_types(model(16), "IQ3_XXS", "llama", hparams, has_imatrix=True)
    assert low["blk.0.attn_v.weight"] == low["blk.0.ffn_down.weight"] == "IQ3_XXS"
    assert choose_types(model(16), "IQ4_XS", "llama", hparams, has_imatrix=True)["blk.0.ffn_down.weight"] == "IQ4_XS"


def test_what_the_user_says_comes_first() -> None:
    hparams = {"n_layer": 8, "n_head": 8, "n_head_kv": 8}
    tensors = model(8)
    chosen = choose_types(
        tensors,
        "Q4_K",
        "llama",
        hparams,
        tensor_types=[(r"BLK\.[0-3]\.attn_v", "q8_0"), ("attn_v", "F16"), ("attn_q", "IQ4_NL")],
        output_type="F16",
        token_embedding_type="Q8_0",
    )
    assert [chosen[f"blk.{i}.attn_v.weight"] for i in (0, 3, 4, 7)] == ["Q8_0", "Q8_0", "F16", "F16"]
    assert chosen["blk.2.attn_q.weight"] == "IQ4_NL"
    assert (chosen["output.weight"], chosen["token_embd.weight"]) == ("F16", "Q8_0")
    assert chosen["blk.7.ffn_down.weight"] == "Q6_K"
    pure = choose_types(tensors, "Q4_K_M", "llama", hparams, pure=True)
    assert set(pure.values()) == {"Q4_K", "F32"}
    assert choose_types(tensors, "Q4_K_M", "llama", hparams, leave_output=True)["output.weight"] == "BF16"
    assert list(chosen) == [name for name, _, _ in tensors]


def test_a_type_by_hand_does_not_advance_the_count_of_layers() -> None:
    hparams = {"n_layer": 8, "n_head": 8, "n_head_kv": 8}
    chosen = choose_types(model(8), "Q3_K_M", "llama", hparams, tensor_types=[(r"blk\.0\.attn_v", "Q8_0")])
    assert [chosen[f"blk.{i}.attn_v.weight"] for i in range(4)] == ["Q8_0", "Q5_K", "Q5_K", "Q4_K"]


@pytest.mark.parametrize(
    ("ftype", "columns", "wanted"),
    [
        ("Q4_K_S", 96, "Q5_0"),
        ("Q5_K_S", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q2_K_S", 96, "Q4_0"),
        ("Q3_K_S", 288, "Q4_0"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("TQ2_0", 96, "Q4_0"),
        ("Q4_K_S", 100, "F16"),
        ("Q8_0", 100, "F16"),
        ("Q4_0", 80, "F16"),
        ("IQ3_S", 100, "F16"),
    ],
)
def test_rows_that_a_type_cannot_hold(ftype: str, columns: int, wanted: str) -> None:
    tensors = [("blk.9.attn_q.weight", (4, columns), "BF16"), ("output.weight", (4, 256), "BF16")]
    assert choose_types(tensors, ftype, "llama", {"n_layer": 12})["blk.9.attn_q.weight"] == wanted


def test_stacked_tensors_and_mxfp4() -> None:
    tensors = model(4, suffix="_exps", experts=16)
    chosen = choose_types(tensors, "MXFP4_MOE", "gpt-oss", {"n_layer": 4, "n_expert": 16})
    assert chosen["blk.3.ffn_up_exps.weight"] == "MXFP4"
    assert chosen["blk.3.attn_q.weight"] == chosen["token_embd.weight"] == "Q8_0"
    tensors = [("blk.0.attn_k_b.weight", (16, 64, 128), "BF16"), ("blk.0.ffn_up_exps.weight", (16, 64, 128), "BF16")]
    chosen = choose_types(tensors, "MXFP4_MOE", "bailingmoe3", {"n_layer": 4, "n_expert": 16})
    assert list(chosen.values()) == ["Q8_0", "MXFP4"]


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blk.0.attn_q.weight", (512, 256), True),
        ("blk.0.attn_q.bias", (512,), False),
        ("blk.0.attn_q_norm.weight", (8, 64), False),
        ("blk.0.ffn_gate_inp.weight", (8, 256), False),
        ("blk.0.ssm_conv1d.weight", (512, 4), False),
        ("blk.0.ffn_down.weight", (1, 256), False),
        ("blk.0.time_mix_lerp_fused.weight", (5, 1, 256), False),
        ("position_embd.weight", (512, 256), False),
        ("v.patch_embd.weight", (4, 256), False),
    ],
)
def test_what_is_quantized_at_all(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    assert quantizable(name, shape) is wanted


def test_which_tensors_need_an_importance_matrix() -> None:
    assert needs_importance("blk.0.ffn_up.weight", "IQ2_XS", "IQ2_XS")
    assert needs_importance("blk.0.ffn_up.weight", "Q2_K", "Q2_K_S")
    assert not needs_importance("blk.0.ffn_up.weight", "Q2_K", "Q2_K")
    assert not needs_importance("blk.0.ffn_up.weight", "IQ3_S", "IQ3_M")
    assert not needs_importance("token_embd.weight", "IQ2_XS", "IQ2_XS")


def test_file_type_numbers_are_gguf_s() -> None:
    for name, row in FILE_TYPES.items():
        member = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert getattr(gguf.LlamaFileType, member, 41 if name == "Q2_0" else None) == row.number  # gguf 0.19 lacks it
    assert file_type("q4_k") == ("Q4_K_M", FILE_TYPES["Q4_K_M"])


def test_errors() -> None:
    hparams = {"n_layer": 1}
    tensor: list[Tensor] = [("blk.0.attn_q.weight", (4, 100), "F16"), ("output.weight", (4, 256), "F16")]
    with pytest.raises(UsageError, match="'Q4_K_XL' is no quantization"):
        choose_types(tensor, "Q4_K_XL", "llama", hparams)
    with pytest.raises(UsageError, match=r"'output.weight' has rows of 100 weights, which Q8_0 cannot hold"):
        choose_types([("output.weight", (4, 100), "F16")], "Q4_0", "llama", hparams, output_type="Q8_0")
    with pytest.raises(UsageError, match=r"'token_embd.weight' has rows of 96 weights, which Q6_K cannot hold"):
        choose_types([("token_embd.weight", (4, 96), "F16")], "Q4_0", "llama", hparams, token_embedding_type="Q6_K")
    with pytest.raises(UsageError, match="is no regular expression"):
        choose_types(tensor, "Q4_K_M", "llama", hparams, tensor_types=[("attn_(", "Q8_0")])
    with pytest.raises(UsageError, match="'Q9' is no GGUF tensor type"):
        choose_types(tensor, "Q4_K_M", "llama", hparams, output_type="Q9")
