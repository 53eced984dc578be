"""A plug-in for axolotl: every save of its trainer becomes a version in the registry.

    plugins:
      - adapterkit.integrations.axolotl.RegisterPlugin
    adapterkit_name: tickets
    adapterkit_alias: candidate        # optional

It follows ``src/axolotl/integrations/base.py`` (``BasePlugin``, ``load_plugin``). The base is the config's ``base_model``, and
the data are called what its ``datasets`` are.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

try:
    from axolotl.integrations.base import BasePlugin as _Plugin
except ImportError:  # to be read, and tested, without axolotl
    _Plugin = object


class RegisterArguments(BaseModel):  # type: ignore[misc]
    """The keys of an axolotl config that are ours."""

    adapterkit_name: str | None = None
    adapterkit_alias: str | None = None
    adapterkit_strict: bool = False


class RegisterPlugin(_Plugin):  # type: ignore[misc]
    """Adds the callback of `adapterkit.integrations.transformers` to axolotl's trainer."""

    def get_input_args(self) -> str:
        """Where axolotl finds the keys."""
        return f"{__name__}.RegisterArguments"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback; none where the config names no ``adapterkit_name``."""
        name = _get(cfg, "adapterkit_name")
        if not name:
            return []
        from adapterkit.integrations.transformers import RegisterCallback

        sets = [str(_get(one, "path") or "") for one in _get(cfg, "datasets") or []]
        return [
            RegisterCallback(
                name,
                alias=_get(cfg, "adapterkit_alias") or "",
                data=", ".join(one for one in sets if one and not one.startswith(("/", ".", "~"))),
                strict=bool(_get(cfg, "adapterkit_strict")),
            )
        ]


def _get(cfg: Any, key: str) -> Any:
    return cfg.get(key) if hasattr(cfg, "get") else getattr(cfg, key, None)
