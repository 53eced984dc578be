"""Combination methods: ``METHODS`` is the table, ``combine`` applies a row of it."""

from __future__ import annotations

from adapterkit.ops.methods import elementwise, lego, linear, spaces, spectral  # noqa: F401  (each registers its methods)
from adapterkit.ops.methods.combine import combine
from adapterkit.ops.methods.registry import METHODS, Method, Parameter, Range, find

__all__ = ["METHODS", "Method", "Parameter", "Range", "combine", "find"]
