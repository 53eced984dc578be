"""A merge of mergekit, read from its YAML as a recipe of ours, as far as its method is one of ours.

Each row of `METHODS` says which rule it is and what becomes of its parameters; everything that a file says and no row knows is
refused by name. Values that go by filter or from the first layer to the last stay so (`adapterkit.ops.settings`). Methods with
random masks draw other masks than mergekit's. The output is ``merged`` beside the file.

Source: mergekit 0.1.5, ``config.py``, ``plan.py`` and ``merge_methods/``; `bench/proofs/mergekit.py` runs both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NoReturn

from adapterkit.errors import RecipeError

SUFFIXES = (".yml", ".yaml")
OUTPUT = "merged"
_TOP = frozenset(
    {"models", "slices", "merge_method", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source"}
)
_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_LARGEST = 1 << 20  # bytes of a file


@dataclass(frozen=True)
class PeerMethod:
    """A method of mergekit.

    Attributes:
        method: of `adapterkit.ops.rules`.
        shared: parameters of the merge, ours by theirs.
        each: parameters of each model, ours by theirs.
        fixed: parameters of ours that make its rule mergekit's.
        normalize: its default of ``normalize``; None where it has no such parameter.
        weighted: whether models have weights.
        ignored: parameters that change no value.
        alone: how many models beside the base it takes; None for any number.
        whole: the method where no base is named: of whole weights, the first model's among them.
    """

    method: str
    shared: Mapping[str, str] = field(default_factory=dict)
    each: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    normalize: bool | None = None
    weighted: bool = True
    ignored: frozenset[str] = frozenset()
    alone: int | None = None
    whole: str = ""


_MASKED = frozenset({"int8_mask"})
_DENSITY = {"density": "density"}
METHODS: Mapping[str, PeerMethod] = {
    "linear": PeerMethod("linear", normalize=True),
    "task_arithmetic": PeerMethod("linear", normalize=False, ignored=_MASKED | {"density"}),
    "ties": PeerMethod("ties", each=_DENSITY, normalize=True, ignored=_MASKED),
    "dare_linear": PeerMethod("dare", each=_DENSITY, ignored=_MASKED),
    "dare_ties": PeerMethod("dare-ties", each=_DENSITY, normalize=False, ignored=_MASKED),
    "breadcrumbs": PeerMethod("breadcrumbs", each={**_DENSITY, "gamma": "gamma"}, normalize=False, ignored=_MASKED),
    "breadcrumbs_ties": PeerMethod(
        "breadcrumbs-ties", each={**_DENSITY, "gamma": "gamma"}, normalize=False, ignored=_MASKED
    ),
    "della": PeerMethod(
        "della", each={**_DENSITY, "epsilon": "epsilon"}, fixed={"elect": True}, normalize=True, ignored=_MASKED
    ),
    "della_linear": PeerMethod(
        "della", each={**_DENSITY, "epsilon": "epsilon"}, fixed={"elect": False}, ignored=_MASKED
    ),
    "model_stock": PeerMethod("model-stock", {"filter_wise": "filter_wise"}, fixed={"signed": True}, weighted=False),
    "sce": PeerMethod("sce", {"density": "select_topk"}, weighted=False, ignored=_MASKED),
    "slerp": PeerMethod("slerp-weights", {"t": "t"}, weighted=False, alone=1),
    "nuslerp": PeerMethod("nuslerp", alone=2, whole="nuslerp-weights"),
    "multislerp": PeerMethod("multislerp", ignored=frozenset({"eps"}), whole="multislerp-weights"),
    "karcher": PeerMethod(
        "karcher-weights", {"steps": "max_iter", "tolerance": "tol"}, weighted=False, whole="karcher-weights"
    ),
    "nearswap": PeerMethod("nearswap", {"t": "t"}, weighted=False, alone=1),
    "arcee_fusion": PeerMethod("arcee-fusion", weighted=False, alone=1),
    "ram": PeerMethod("ram", {"epsilon": "epsilon"}, weighted=False),
    "ramplus_tl": PeerMethod("ramplus-tl", {"epsilon": "epsilon", "r": "r", "alpha": "alpha"}, weighted=False),
}
# mergekit's own defaults where ours differ, and what it takes for an unset parameter of a model.
_DEFAULTS = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15, "select_topk": 1.0}
_BY_MERGEKIT = "let mergekit write that model; adapters are merged into it here as into any other"
_ELSEWHERE = {"passthrough": f"adapterkit stacks no layers of several models: {_BY_MERGEKIT}"}
# Parameters whose one accepted value says what happens anyway; ``rescale`` is on in what drops at random.
_ONLY = {"nuslerp_row_wise": False, "normalize_weights": True, "nuslerp_flatten": True}
_RESCALED = frozenset({"dare_linear", "dare_ties", "della", "della_linear"})


def is_mergekit(path: Path) -> bool:
    """Whether a recipe is one of mergekit's, by its name."""
    return path.suffix.lower() in SUFFIXES


def read_mergekit(path: Path) -> dict[str, Any]:
    """The same merge as the data of a recipe.

    Raises:
        RecipeError: it is no YAML, no merge of mergekit, or one whose method, parameter or shape we have not.
    """
    import yaml

    if path.stat().st_size > _LARGEST:
        raise RecipeError(f"{path} is larger than any recipe", "name a recipe", (str(path), 1))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        what = getattr(error, "problem", None) or "it cannot be read"
        raise RecipeError(f"{path}:{line}: this is not YAML: {what}", "correct it", (str(path), line)) from None
    if not isinstance(data, dict) or not isinstance(data.get("merge_method"), str):
        raise RecipeError(f"{path} has no merge_method", "give a recipe of mergekit, or one in TOML", (str(path), 1))
    return _Merge(path, data).recipe()


class _Merge:
    """One file of mergekit, on its way to a recipe."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self._path, self._data = path, data
        self._known_keys(data, _TOP, "the file")
        self.name: str = data["merge_method"]
        if self.name not in METHODS:
            why = _ELSEWHERE.get(self.name, f"the methods that are: {', '.join(METHODS)}")
            self._fail(f"merge_method {self.name} is none that adapterkit computes as mergekit does", why)
        self.row = METHODS[self.name]
        self.models, self._scopes = self._listed()

    def recipe(self) -> dict[str, Any]:
        base, others = self._base()
        whole = self.row.whole if self._data.get("base_model") is None else ""
        alone = 1 if whole and self.row.alone == 2 else self.row.alone
        if alone is not None and len(others) != alone:
            self._fail(
                f"{self.name} takes {alone} beside {'the first' if whole else 'the base'}, and the file has {len(others)}",
                "correct it",
            )
        if not others:
            self._fail("no model beside the base is named", "add one under models")
        parameters = dict(self.row.fixed)
        self._check_parameters(others)
        for ours, theirs in self.row.shared.items():
            value = self._rows(self._value(theirs, None), _DEFAULTS.get(theirs))
            if value is not None:
                parameters[ours] = self._whole_number(value, theirs) if ours == "steps" else value
        for ours, theirs in self.row.each.items():
            values = [self._rows(self._value(theirs, ref), _DEFAULTS[theirs]) for ref in others]
            parameters[ours] = values[0] if all(value == values[0] for value in values) else values
        if "gamma" in self.row.each:
            self._no_outliers(parameters)
        weights: list[Any] = [1.0] * len(others)
        if self.row.weighted:
            weights = self._weights(base, others, parameters, whole)
        merge: dict[str, Any] = {"method": whole or self.row.method}
        scale = self._value("lambda", None)
        if scale is not None:
            merge["lambda"] = self._number(scale, "lambda")
        if parameters:
            merge["parameters"] = parameters
        adapters = {
            f"{place + 1}-{_short(ref)}": {"ref": self._place(ref, base), "weight": weight}
            for place, (ref, weight) in enumerate(zip(others, weights, strict=True))
        }
        output: dict[str, Any] = {"path": OUTPUT}
        dtype = self._data.get("out_dtype") or self._data.get("dtype")
        if dtype is not None:
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                self._fail(f"dtype {brief(dtype)} is none that is written", f"use {', '.join(_DTYPES)}")
            output["dtype"] = _DTYPES[dtype]
        tokens = self._data.get("tokenizer_source")
        if tokens not in (None, "base", base):
            self._fail(
                f"tokenizer_source {brief(tokens)} takes another vocabulary than the base's",
                f"use base, or {_BY_MERGEKIT}",
            )
        return {"base": base, "adapters": adapters, "merge": merge, "outputs": {OUTPUT: output}}

    def _listed(self) -> tuple[dict[str, Mapping[str, Any]], list[Mapping[str, Any]]]:
        """Models with their own parameters, in order, and the parameters of everything, nearest first."""
        top = self._mapping(self._data.get("parameters"), "parameters")
        models, slices = self._data.get("models"), self._data.get("slices")
        if (models is None) == (slices is None):
            self._fail("it needs either models or slices", "name the models")
        scopes = [top]
        if slices is not None:
            if not isinstance(slices, list) or len(slices) != 1:
                self._fail("it stacks several slices of layers", _ELSEWHERE["passthrough"])
            part = self._mapping(slices[0], "slices[0]")
            self._known_keys(part, frozenset({"sources", "parameters"}), "slices[0]")
            scopes.insert(0, self._mapping(part.get("parameters"), "slices[0].parameters"))
            models = part.get("sources")
        found: dict[str, Mapping[str, Any]] = {}
        for item in models if isinstance(models, list) else ():
            one = self._mapping(item, "a model")
            self._known_keys(one, frozenset({"model", "parameters", "layer_range"}), "a model")
            ref = one.get("model")
            if not isinstance(ref, str) or not ref:
                self._fail("a model has no name", "write model: NAME")
            if ref in found:
                self._fail(f"{ref} is named twice", "give it one weight")
            self._whole(ref, one.get("layer_range"))
            found[ref] = self._mapping(one.get("parameters"), f"the parameters of {ref}")
        if not found:
            self._fail("it names no models", "name them under models")
        return found, scopes

    def _base(self) -> tuple[str, list[str]]:
        """The base, and what is merged into it."""
        base = self._data.get("base_model")
        if base is None:
            if self.name != "linear" and not self.row.whole:
                self._fail(
                    f"{self.name} without base_model is of whole weights, and adapterkit's is of changes", "name it"
                )
            base = next(iter(self.models))
        if not isinstance(base, str) or "+" in base:
            self._fail(f"base_model {brief(base)} is no plain name of a model", "merge its adapter first")
        return base, [ref for ref in self.models if ref != base]

    def _place(self, ref: str, base: str) -> str:
        """``MODEL+LORA`` on the base itself is the adapter alone."""
        model, plus, adapter = ref.partition("+")
        if plus and model != base:
            self._fail(f"{ref} is an adapter on another model than base_model", "merge it into its model first")
        return adapter if plus else ref

    def _whole(self, ref: str, layers: Any) -> None:
        """Refuse a range of layers that is not all of a model's."""
        if layers is None:
            return
        from adapterkit.checkpoint.open import locate

        place = ref.partition("+")[0]
        here = self._path.parent / place
        listing = locate(here if here.is_dir() else place, headers_only=True)
        config = listing.json("config.json")
        inner = config.get("text_config")
        count = config.get("num_hidden_layers", inner.get("num_hidden_layers") if isinstance(inner, Mapping) else None)
        if layers != [0, count]:
            self._fail(
                f"layer_range {brief(layers)} of {ref} is not all of its {count} layers", "adapterkit keeps them all"
            )

    def _value(self, name: str, ref: str | None) -> Any:
        """A parameter, of a model or of everything; None where it is not said."""
        own = [] if ref is None else [self.models[ref]]
        return next((scope[name] for scope in (*own, *self._scopes) if name in scope), None)

    def _weights(self, base: str, others: Sequence[str], parameters: dict[str, Any], whole: str) -> list[Any]:
        """A number for each model; values by part of the model go into ``parameters``."""
        given = [self._value("weight", ref) for ref in others]
        if any(value is None for value in given):
            ref = others[given.index(None)]
            self._fail(f"{ref} has no weight", "give it one")
        asked = self._value("normalize", None)
        if whole:
            own = self._rows(self._value("weight", base), None)
            if own is None:
                self._fail(f"{base} has no weight", "give it one")
            parameters["own"] = own
            if any(_smallest(self._rows(value, None)) < 0 for value in (own, *given)):
                self._fail(
                    f"{self.name} of whole weights with a weight below 0 is not computed here", "leave out the model"
                )
        if self.row.normalize is None and asked:
            self._fail(f"normalize of {self.name} is none of ours", "leave it out")
        normalize = bool(self.row.normalize if asked is None else asked)
        if self.name == "linear":
            return self._averaged(base, given, normalize, parameters)
        if self.row.normalize is not None:
            parameters["normalize"] = "weights" if normalize else "none"
        rows = [self._rows(value, None) for value in given]
        if normalize and any(_smallest(value) < 0 for value in rows):
            self._fail("a negative weight with normalize divides by something else in mergekit", "set normalize: false")
        if all(isinstance(value, (int, float)) for value in given):
            return [float(value) for value in given]
        parameters["weight"] = rows
        return [1.0] * len(given)

    def _averaged(self, base: str, given: list[Any], normalize: bool, parameters: dict[str, Any]) -> list[Any]:
        """mergekit's mean of whole weights as changes of the base, whose own weight has a part in the sum.

        sum w_i W_i / sum w_i = W_0 + sum over i > 0 of (w_i / sum w) (W_i - W_0).
        """
        # A base that is not listed is merged too, with the weight of everything.
        own = self._value("weight", base if base in self.models else None)
        if own is None:
            self._fail(f"{base} has no weight", "name it under models, with one")
        every = [own, *given]
        lists = [value if isinstance(value, list) else [value] for value in every]
        size = max(map(len, lists))
        if not all(isinstance(one, (int, float)) for value in lists for one in value) or any(
            len(value) not in (1, size) for value in lists
        ):
            self._fail(
                "the weights of linear go by filters, or in lists of several lengths", "give each model one weight"
            )
        sums = [sum(value[0] if len(value) == 1 else value[place] for value in lists) for place in range(size)]
        total = sums[0]
        if max(sums) - min(sums) > 1e-9 * max(1.0, abs(total)):
            self._fail("the weights of linear do not add up to the same in all layers", "let them add up to 1")
        if not normalize and abs(total - 1) > 1e-9:
            self._fail(
                f"weights that add up to {total:g} without normalize scale the base itself", "let them add up to 1"
            )
        if total == 0:
            self._fail("the weights add up to 0", "correct them")
        shares = [[one / total for one in value] for value in lists[1:]]
        if size == 1:
            return [value[0] for value in shares]
        parameters["weight"] = [[{"value": value}] for value in shares]
        return [1.0] * len(shares)

    def _no_outliers(self, parameters: dict[str, Any]) -> None:
        """mergekit removes no outliers where the density is 1."""
        density, gamma = parameters["density"], parameters["gamma"]
        if density == 1.0:
            parameters["gamma"] = 0.0
        elif isinstance(density, list):
            values = gamma if isinstance(gamma, list) else [gamma] * len(density)
            parameters["gamma"] = [0.0 if d == 1.0 else g for d, g in zip(density, values, strict=True)]

    def _check_parameters(self, others: Sequence[str]) -> None:
        """Refuse a parameter that nothing reads."""
        row = self.row
        shared = {*row.shared.values(), *row.ignored, *_ONLY, "lambda", "normalize", "rescale"}
        each = {*row.each.values(), *row.ignored} | ({"weight"} if row.weighted else set())
        for scope in self._scopes:
            for name, value in scope.items():
                if name not in shared | each:
                    self._fail(f"{self.name} has no parameter {name} here", "leave it out")
                if name in _ONLY and value is not _ONLY[name]:
                    self._fail(f"{name}: {value} is not computed here", f"set {name}: {str(_ONLY[name]).lower()}")
        rescale = self._value("rescale", None)
        if rescale not in (None, self.name in _RESCALED):
            self._fail(f"rescale: {brief(rescale)} of {self.name} is not computed here", "leave it out")
        for ref in others:
            for name in self.models[ref]:
                if name not in each:
                    self._fail(f"{self.name} has no parameter {name} of a model here ({ref})", "leave it out")

    def _rows(self, value: Any, default: Any) -> Any:
        """A value as `adapterkit.ops.settings` writes it."""
        if value is None:
            return default
        if not isinstance(value, list):
            return self._plain(value)
        if not value:
            self._fail("an empty list is no value", "give a number, or leave it out")
        if not all(isinstance(row, Mapping) for row in value):
            return [{"value": [self._plain(one) for one in value]}]
        rows = []
        for row in value:
            self._known_keys(row, frozenset({"filter", "value"}), "a value with filters")
            inner = row.get("value")
            plain = [self._plain(one) for one in inner] if isinstance(inner, list) else self._plain(inner)
            rows.append(
                {"value": plain} if row.get("filter") in (None, "*") else {"filter": row["filter"], "value": plain}
            )
        if "filter" in rows[-1] and default is not None:
            rows.append({"value": default})
        return rows

    def _plain(self, value: Any) -> Any:
        if not isinstance(value, (bool, int, float)):
            self._fail(f"{brief(value)} is no number", "correct it")
        return value if isinstance(value, bool) else self._float(value)

    def _float(self, value: float) -> float:
        try:
            return float(value)
        except OverflowError:
            self._fail(f"{brief(value)} is too large", "correct it")

    def _number(self, value: Any, name: str) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self._fail(f"{name} is not one number for the whole model", "give one number")
        return self._float(value)

    def _whole_number(self, value: Any, name: str) -> int:
        number = self._number(value, name)
        if not number.is_integer():
            self._fail(f"{name} {brief(value)} is no whole number", "correct it")
        return int(number)

    def _mapping(self, value: Any, what: str) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self._fail(f"{what} is no table", "see mergekit's README")
        return value

    def _known_keys(self, data: Mapping[str, Any], known: frozenset[str], what: str) -> None:
        strange = next((name for name in data if name not in known), None)
        if strange is not None:
            self._fail(f"{what} says {strange}, which is not read here", f"read are: {', '.join(sorted(known))}")

    def _fail(self, message: str, hint: str) -> NoReturn:
        raise RecipeError(f"{self._path}: {message}", hint, (str(self._path), 1))


def _smallest(value: Any) -> float:
    """The smallest number of a value, of a list of them, or of rows with filters."""
    if isinstance(value, list):
        return min((_smallest(one) for one in value), default=0.0)
    if isinstance(value, Mapping):
        return _smallest(value.get("value"))
    return float(value) if isinstance(value, (int, float)) else 0.0


def _short(ref: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in ref.rstrip("/").rpartition("/")[2]) or "model"
