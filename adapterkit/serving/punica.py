"""What LoRAX makes of an adapter, and TGI, whose code for adapters comes from it."""

from __future__ import annotations

from adapterkit.serving.server import PLAIN, SCALED, Expectation


def expectations(source: str) -> tuple[Expectation, ...]:
    """Both read pairs of A and B by name and one scale; the rest of an adapter is not read."""
    return (
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", source, PLAIN),
        Expectation("dora", "wrong", "magnitudes are not read", source, PLAIN),
        Expectation("alpha_pattern", "wrong", "one alpha/r is used for all modules", source, SCALED),
        Expectation("rank_pattern", "wrong", "one alpha/r is used for all modules", source, SCALED),
        Expectation("residual", "wrong", "the base is not brought to the residual", source, PLAIN),
        Expectation("whole", "wrong", "whole modules are not read", source),
        Expectation("bias", "wrong", "biases are not read", source),
        Expectation("tokens", "wrong", "token rows are not read", source),
        Expectation("embedding", "wrong", "factors of embeddings are not read", source),
        Expectation("experts", "wrong", "target_parameters is not read", source),
        Expectation(
            "some_layers", "wrong", "a kind of module that lacks factors in one layer is left out in all", source
        ),
    )
