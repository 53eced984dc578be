"""adapterkit: merge, convert, verify and track fine-tuning adapters without loading the model.

    import adapterkit

    report = adapterkit.merge("base", ["adapter"], "merged")

Names are imported when they are first used, so that ``import adapterkit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adapterkit._version import __version__
from adapterkit.checkpoint.finders import add_finder, set_maker
from adapterkit.rows import hand_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fold import Folded, fold
    from adapterkit.adapters.load import load_adapter
    from adapterkit.bases import open_model
    from adapterkit.bases import open_model as open
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.finders import Found
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.save import save
    from adapterkit.errors import AdapterkitError
    from adapterkit.provenance.register import register
    from adapterkit.recipe.run import build, plan_build
    from adapterkit.requests.adapters import CombineRequest, ExtractRequest, ResizeRequest
    from adapterkit.requests.convert import ConvertRequest
    from adapterkit.requests.evaluate import EvaluateRequest
    from adapterkit.requests.formats import Format
    from adapterkit.requests.merge import MergeRequest
    from adapterkit.requests.publish import PullRequest, PushRequest
    from adapterkit.requests.register import RegisterRequest
    from adapterkit.requests.verify import VerifyRequest
    from adapterkit.requests.workers import RunRequest
    from adapterkit.serving.handover import Handover, handover
    from adapterkit.verbs.check import CheckReport, check
    from adapterkit.verbs.combine import combine, combined
    from adapterkit.verbs.compare import CompareReport, compare
    from adapterkit.verbs.convert import convert, plan_convert
    from adapterkit.verbs.doctor import DoctorReport, doctor
    from adapterkit.verbs.evaluate import EvaluateReport, evaluate
    from adapterkit.verbs.execute import OpenPlan, execute
    from adapterkit.verbs.extract import extract
    from adapterkit.verbs.family import Family, open_family
    from adapterkit.verbs.imatrix import ImatrixReport, imatrix
    from adapterkit.verbs.inspect import Inspection, inspect
    from adapterkit.verbs.merge import merge
    from adapterkit.verbs.plan_merge import plan_merge
    from adapterkit.verbs.publish import pull, push
    from adapterkit.verbs.report import (
        CombineReport,
        ConvertReport,
        ExtractReport,
        MergeReport,
        PartReport,
        ResizeReport,
    )
    from adapterkit.verbs.resize import resize
    from adapterkit.verbs.run import RunReport, run
    from adapterkit.verbs.verify import VerifyReport, verify

_WHERE = {
    "open_model": "adapterkit.bases:open_model",
    "register": "adapterkit.provenance.register:register",
    "push": "adapterkit.verbs.publish:push",
    "pull": "adapterkit.verbs.publish:pull",
    "MergeRequest": "adapterkit.requests.merge:MergeRequest",
    "ConvertRequest": "adapterkit.requests.convert:ConvertRequest",
    "CombineRequest": "adapterkit.requests.adapters:CombineRequest",
    "ExtractRequest": "adapterkit.requests.adapters:ExtractRequest",
    "ResizeRequest": "adapterkit.requests.adapters:ResizeRequest",
    "EvaluateRequest": "adapterkit.requests.evaluate:EvaluateRequest",
    "VerifyRequest": "adapterkit.requests.verify:VerifyRequest",
    "PullRequest": "adapterkit.requests.publish:PullRequest",
    "PushRequest": "adapterkit.requests.publish:PushRequest",
    "RegisterRequest": "adapterkit.requests.register:RegisterRequest",
    "RunRequest": "adapterkit.requests.workers:RunRequest",
    "Adapter": "adapterkit.adapters.adapter:Adapter",
    "AdapterkitError": "adapterkit.errors:AdapterkitError",
    "CheckReport": "adapterkit.verbs.check:CheckReport",
    "Checkpoint": "adapterkit.checkpoint.checkpoint:Checkpoint",
    "CombineReport": "adapterkit.verbs.report:CombineReport",
    "CompareReport": "adapterkit.verbs.compare:CompareReport",
    "ConvertReport": "adapterkit.verbs.report:ConvertReport",
    "EvaluateReport": "adapterkit.verbs.evaluate:EvaluateReport",
    "ExtractReport": "adapterkit.verbs.report:ExtractReport",
    "DoctorReport": "adapterkit.verbs.doctor:DoctorReport",
    "Family": "adapterkit.verbs.family:Family",
    "Folded": "adapterkit.adapters.fold:Folded",
    "Handover": "adapterkit.serving.handover:Handover",
    "ImatrixReport": "adapterkit.verbs.imatrix:ImatrixReport",
    "OpenPlan": "adapterkit.verbs.execute:OpenPlan",
    "RunReport": "adapterkit.verbs.run:RunReport",
    "run": "adapterkit.verbs.run:run",
    "Inspection": "adapterkit.verbs.inspect:Inspection",
    "MergeReport": "adapterkit.verbs.report:MergeReport",
    "PartReport": "adapterkit.verbs.report:PartReport",
    "Plan": "adapterkit.checkpoint.plan:Plan",
    "ResizeReport": "adapterkit.verbs.report:ResizeReport",
    "VerifyReport": "adapterkit.verbs.verify.report:VerifyReport",
    "build": "adapterkit.recipe.run:build",
    "check": "adapterkit.verbs.check:check",
    "combine": "adapterkit.verbs.combine:combine",
    "combined": "adapterkit.verbs.combine:combined",
    "compare": "adapterkit.verbs.compare:compare",
    "convert": "adapterkit.verbs.convert:convert",
    "doctor": "adapterkit.verbs.doctor:doctor",
    "evaluate": "adapterkit.verbs.evaluate:evaluate",
    "execute": "adapterkit.verbs.execute:execute",
    "extract": "adapterkit.verbs.extract:extract",
    "fold": "adapterkit.adapters.fold:fold",
    "handover": "adapterkit.serving.handover:handover",
    "imatrix": "adapterkit.verbs.imatrix:imatrix",
    "inspect": "adapterkit.verbs.inspect:inspect",
    "load_adapter": "adapterkit.adapters.load:load_adapter",
    "merge": "adapterkit.verbs.merge:merge",
    "open": "adapterkit.bases:open_model",
    "open_family": "adapterkit.verbs.family:open_family",
    "plan_build": "adapterkit.recipe.run:plan_build",
    "plan_convert": "adapterkit.verbs.convert:plan_convert",
    "plan_merge": "adapterkit.verbs.plan_merge:plan_merge",
    "resize": "adapterkit.verbs.resize:resize",
    "save": "adapterkit.checkpoint.save:save",
    "verify": "adapterkit.verbs.verify:verify",
}

__all__ = [
    "Adapter",
    "AdapterkitError",
    "CheckReport",
    "Checkpoint",
    "CombineReport",
    "CombineRequest",
    "CompareReport",
    "ConvertReport",
    "ConvertRequest",
    "DoctorReport",
    "EvaluateReport",
    "EvaluateRequest",
    "ExtractReport",
    "ExtractRequest",
    "Family",
    "Folded",
    "Handover",
    "ImatrixReport",
    "Inspection",
    "MergeReport",
    "MergeRequest",
    "OpenPlan",
    "PartReport",
    "Plan",
    "PullRequest",
    "PushRequest",
    "RegisterRequest",
    "ResizeReport",
    "ResizeRequest",
    "RunReport",
    "RunRequest",
    "VerifyReport",
    "VerifyRequest",
    "__version__",
    "build",
    "check",
    "combine",
    "combined",
    "compare",
    "convert",
    "doctor",
    "evaluate",
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
    "open_model",
    "plan_build",
    "plan_convert",
    "plan_merge",
    "pull",
    "push",
    "register",
    "resize",
    "run",
    "save",
    "verify",
]


def _registered(ref: str) -> Found | None:
    from adapterkit.registry.finder import find

    return find(ref)


def _formats() -> Iterator[Format]:
    from adapterkit.rows import brought
    from adapterkit.verbs import conversions

    return brought("adapterkit.verbs.conversions", conversions.__path__, "FORMAT", conversions.LISTED)


add_finder(_registered)  # registry names work wherever a path does
hand_in("formats", _formats)  # a file that is put among the conversions is a format


def _remade(at: Any, record: Any, folder: Path, base: Any) -> Path:
    from adapterkit.verbs.remake import make

    return make(at, record, folder, base)


set_maker(_remade)  # what is kept as its recipe is made again where its bytes are asked for


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        from adapterkit.deprecation import DEPRECATIONS, deprecated

        if f"adapterkit.{name}" in DEPRECATIONS:
            return __getattr__(deprecated(f"adapterkit.{name}").rpartition(".")[2])
        raise AttributeError(f"module 'adapterkit' has no attribute '{name}'")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
