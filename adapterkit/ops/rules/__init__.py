"""Combination methods: ``RULES`` is the table, ``combine`` applies a row of it."""

from __future__ import annotations

from adapterkit.ops.rules import based, elementwise, lego, linear, overlap, spaces, spectral, spherical, whole  # noqa: F401  (each registers its methods)
from adapterkit.ops.rules.combine import combine
from adapterkit.ops.rules.registry import RULES, CombinationRule, Parameter, Range, find

__all__ = ["RULES", "CombinationRule", "Parameter", "Range", "combine", "find"]
