"""What a row of the table of servers says of a server that runs: how it is asked and told, and how its answers are read.

Calls are values, so that a row holds no connection; `adapterkit.verbs.deploy` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Prompt = str | list[int]
"""Text, or ids of tokens."""
TOKENS = 8
"""Tokens of an answer to a probe."""


@dataclass(frozen=True)
class Call:
    """One request to a server: method, path after its address, and the JSON that is sent."""

    method: str
    path: str
    body: Any = None


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that a server says it has.

    Attributes:
        name: what a request calls it.
        path: where the server read it; empty where it does not say.
        scale: how much of it is applied to requests that name none; 0 where requests name adapters.
        place: its number, where the server counts.
    """

    name: str
    path: str = ""
    scale: float = 0.0
    place: int = -1


@dataclass(frozen=True)
class Serving:
    """What a server says that it serves: names of the base (the first is what requests call it), its path, adapters."""

    names: tuple[str, ...] = ()
    path: str = ""
    adapters: tuple[ServedAdapter, ...] = ()


@dataclass(frozen=True)
class ProbeAnswer:
    """What a server said to a prompt: the text, the log-probabilities of its tokens, and the model that it names."""

    text: str
    logprobs: tuple[float, ...] = ()
    model: str = ""

    def same(self, other: ProbeAnswer) -> bool:
        """Whether two answers are equal in all that was said; figures count where both have them."""
        return self.text == other.text and (not self.logprobs or not other.logprobs or self.logprobs == other.logprobs)


@dataclass(frozen=True)
class Live:
    """A server that runs.

    Attributes:
        source: files of the server's own source that this was written by.
        listing: what is asked to know what it serves; several answers are read together.
        listed: those answers as one value.
        probe: the request that answers a prompt with an adapter (its name in requests; empty for the base alone); the second
            value is the name of the base.
        answer: the reply to it.
        load, unload: how it is told; None where it cannot be. ``load`` takes name and path.
        scales: for a server that has its adapters since it was started: how it is told how much of each to apply, by number.
        by_path: requests name an adapter by its path and it is loaded by the first of them.
        knows: whether the listing names adapters; without it only an answer shows that one is served.
        gguf: it reads GGUF files and no folders.
        allow: what has to be set so that it may be told while it runs.
        restart: the command that starts it with adapters, of the base and of pairs of name and path; None where it is told
            while it runs.
        splits: characters at which its command takes a name and a path apart, so that neither may hold them.
        routes: it can send a share of the requests of one name to another adapter.
    """

    source: str
    listing: tuple[Call, ...]
    listed: Callable[[Sequence[Any]], Serving]
    probe: Callable[[str, str, Prompt], Call]
    answer: Callable[[Any], ProbeAnswer]
    load: Callable[[str, str], Call] | None = None
    unload: Callable[[str], Call] | None = None
    scales: Callable[[Sequence[tuple[int, float]]], Call] | None = None
    by_path: bool = False
    knows: bool = True
    gguf: bool = False
    allow: str = ""
    restart: Callable[[str, Sequence[tuple[str, str]]], list[str]] | None = None
    splits: str = ""
    routes: bool = False


def refusal(status: int, value: Any) -> str:
    """Why a server did not do what it was asked; empty when it did.

    Servers say no with a status, or with 200 and ``"success": false``; the sentence is in one of a few places.
    """
    if isinstance(value, Mapping) and value.get("success") is False:
        return str(value.get("error_message") or value.get("message") or "no success")
    if 200 <= status < 300:
        return ""
    said: Any = value
    if isinstance(value, Mapping):
        error = value.get("error")
        said = error.get("message") if isinstance(error, Mapping) else None
        said = said or value.get("error_message") or value.get("message") or value.get("detail") or error or value
    return f"{status}: {' '.join(str(said).split())[:300]}"


# ------------------------------------------------------------------ what several servers share

MODELS = Call("GET", "/v1/models")


def openai_models(answers: Sequence[Any]) -> Serving:
    """``/v1/models`` of vLLM and SGLang: an adapter names its ``parent``, and its path as ``root``."""
    cards = [card for card in _objects(answers[0], "data") if isinstance(card.get("id"), str)]
    bases = [card for card in cards if not card.get("parent")]
    adapters = [card for card in cards if card.get("parent")]
    return Serving(
        tuple(str(card["id"]) for card in bases),
        str(bases[0].get("root") or "") if bases else "",
        tuple(ServedAdapter(str(card["id"]), str(card.get("root") or "")) for card in adapters),
    )


def openai_answer(value: Any) -> ProbeAnswer:
    """``/v1/completions``, with the log-probabilities in either of their forms."""
    choices = _objects(value, "choices")
    if not choices:
        return ProbeAnswer("", model=_text(value, "model"))
    found = choices[0].get("logprobs")
    figures: list[Any] = []
    if isinstance(found, Mapping):
        figures = list(found.get("token_logprobs") or ())
        figures = figures or [one.get("logprob") for one in _objects(found, "content")]
    return ProbeAnswer(_text(choices[0], "text"), _numbers(figures), _text(value, "model"))


def openai_probe(model: str, prompt: Prompt, **more: Any) -> Call:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0, "logprobs": 1, **more}
    return Call("POST", "/v1/completions", body)


def generate_answer(value: Any) -> ProbeAnswer:
    """``/generate`` of LoRAX and TGI."""
    details = value.get("details") if isinstance(value, Mapping) else None
    figures = [one.get("logprob") for one in _objects(details, "tokens")]
    return ProbeAnswer(_text(value, "generated_text"), _numbers(figures))


def generate_probe(prompt: Prompt, **parameters: Any) -> Call:
    asked = {"max_new_tokens": TOKENS, "do_sample": False, "details": True, **parameters}
    return Call("POST", "/generate", {"inputs": prompt, "parameters": asked})


def info_listed(answers: Sequence[Any]) -> Serving:
    """``/info`` of LoRAX and TGI: the base, and no adapters."""
    name = _text(answers[0], "model_id")
    return Serving((name,) if name else (), name)


def _objects(value: Any, key: str) -> list[Mapping[str, Any]]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _text(value: Any, key: str) -> str:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, str) else ""


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(one) for one in values if isinstance(one, (int, float)))
