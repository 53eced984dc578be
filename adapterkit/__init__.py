"""adapterkit: merge, convert, verify and track fine-tuning adapters without loading the model.

    import adapterkit

    report = adapterkit.merge("base", ["adapter"], "merged")

Names are imported when they are first used, so that ``import adapterkit`` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adapterkit._version import __version__
from adapterkit.checkpoint.finders import FINDERS

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter, load_adapter
    from adapterkit.adapters.fold import Folded, fold
    from adapterkit.bases import open_model as open
    from adapterkit.check import CheckReport, check
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.save import save
    from adapterkit.combine import combine, combined
    from adapterkit.compare import CompareReport, compare
    from adapterkit.convert import convert, plan_convert
    from adapterkit.errors import AdapterkitError
    from adapterkit.extract import extract
    from adapterkit.family import Family, open_family
    from adapterkit.handover import Handover, handover
    from adapterkit.imatrix import ImatrixReport, imatrix
    from adapterkit.inspect import Inspection, inspect
    from adapterkit.merge import execute, merge, plan_merge
    from adapterkit.recipe.run import build, plan_build
    from adapterkit.report import CombineReport, ConvertReport, ExtractReport, MergeReport, PartReport, ResizeReport
    from adapterkit.resize import resize
    from adapterkit.verify import VerifyReport, verify

_WHERE = {
    "Adapter": "adapterkit.adapters.adapter:Adapter",
    "AdapterkitError": "adapterkit.errors:AdapterkitError",
    "CheckReport": "adapterkit.check:CheckReport",
    "Checkpoint": "adapterkit.checkpoint.checkpoint:Checkpoint",
    "CombineReport": "adapterkit.report:CombineReport",
    "CompareReport": "adapterkit.compare:CompareReport",
    "ConvertReport": "adapterkit.report:ConvertReport",
    "ExtractReport": "adapterkit.report:ExtractReport",
    "Family": "adapterkit.family:Family",
    "Folded": "adapterkit.adapters.fold:Folded",
    "Handover": "adapterkit.handover:Handover",
    "ImatrixReport": "adapterkit.imatrix:ImatrixReport",
    "Inspection": "adapterkit.inspect:Inspection",
    "MergeReport": "adapterkit.report:MergeReport",
    "PartReport": "adapterkit.report:PartReport",
    "Plan": "adapterkit.checkpoint.plan:Plan",
    "ResizeReport": "adapterkit.report:ResizeReport",
    "VerifyReport": "adapterkit.verify.report:VerifyReport",
    "build": "adapterkit.recipe.run:build",
    "check": "adapterkit.check:check",
    "combine": "adapterkit.combine:combine",
    "combined": "adapterkit.combine:combined",
    "compare": "adapterkit.compare:compare",
    "convert": "adapterkit.convert:convert",
    "execute": "adapterkit.merge:execute",
    "extract": "adapterkit.extract:extract",
    "fold": "adapterkit.adapters.fold:fold",
    "handover": "adapterkit.handover:handover",
    "imatrix": "adapterkit.imatrix:imatrix",
    "inspect": "adapterkit.inspect:inspect",
    "load_adapter": "adapterkit.adapters.adapter:load_adapter",
    "merge": "adapterkit.merge:merge",
    "open": "adapterkit.bases:open_model",
    "open_family": "adapterkit.family:open_family",
    "plan_build": "adapterkit.recipe.run:plan_build",
    "plan_convert": "adapterkit.convert:plan_convert",
    "plan_merge": "adapterkit.merge:plan_merge",
    "resize": "adapterkit.resize:resize",
    "save": "adapterkit.checkpoint.save:save",
    "verify": "adapterkit.verify:verify",
}

__all__ = [
    "Adapter",
    "AdapterkitError",
    "CheckReport",
    "Checkpoint",
    "CombineReport",
    "CompareReport",
    "ConvertReport",
    "ExtractReport",
    "Family",
    "Folded",
    "Handover",
    "ImatrixReport",
    "Inspection",
    "MergeReport",
    "PartReport",
    "Plan",
    "ResizeReport",
    "VerifyReport",
    "__version__",
    "build",
    "check",
    "combine",
    "combined",
    "compare",
    "convert",
    "execute",
    "extract",
    "fold",
    "handover",
    "imatrix",
    "inspect",
    "load_adapter",
    "merge",
    "open",
    "open_family",
    "plan_build",
    "plan_convert",
    "plan_merge",
    "resize",
    "save",
    "verify",
]


FINDERS.append("adapterkit.registry.finder:find")  # registry names work wherever a path does


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'adapterkit' has no attribute '{name}'")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Some verbs are functions in a module of the same name. Importing that module, as every other verb may do, would
    put it in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _WHERE:
            value = getattr(value, _WHERE[name].partition(":")[2])
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
