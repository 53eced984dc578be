"""The claim of an output in a store: which run makes it, of which plan and inputs.

It is a small object, ``claim.json``, in ``.NAME.partial/`` beside the output.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import states_here
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.places import Address
    from adapterkit.stores.store import Store, StoredObject

CLAIM = "claim.json"
FINISHING = "finishing"  # the state in a claim of an output whose files get their names
MOST_SAID = 1 << 16  # bytes of a claim or a note; ours have some hundred


def note_says(store: Store, found: StoredObject) -> dict[str, str]:
    """What a claim or a note says; nothing where it is damaged."""
    if found.size > MOST_SAID:
        return {}
    try:
        said = json_value(store.read(found.key, 0, found.size, found.etag))
        return {str(name): str(value) for name, value in said.items()}
    except (ValueError, AttributeError):
        return {}


def _digits(states: Mapping[str, str]) -> dict[str, str]:
    """What is known of files by name, short enough for a claim."""
    return {name: hashlib.sha256(said.encode()).hexdigest()[:12] for name, said in states.items()}


def _other(theirs: str, ours: Mapping[str, str]) -> str | None:
    """The file that a claim knows by other digits than this run."""
    try:
        found = json_value(theirs)
        return next((name for name, digits in found.items() if name in ours and ours[name] != digits), None)
    except (ValueError, AttributeError):
        return None


def partial_address(out: Address) -> Address:
    """Where the small objects of a run lie."""
    return out.with_name(f".{out.name}.partial")


class Claim:
    """What is said of an output while it is made.

    Args:
        store, place: where the claim lies.
        digest: by which the output is known to be of a plan; asked for when it is needed.
        known: what the plan says of the small files of its inputs, by name.
        sources: the inputs, by name; more may come.

    Attributes:
        run: the name of this run, or of the one that it goes on with.
        own: this run made the claim, or took it over.
        shared: other workers of the same plan may be at it.
    """

    def __init__(
        self,
        store: Store,
        place: Address,
        digest: Callable[[], str],
        known: Mapping[str, str],
        sources: Mapping[str, Source],
    ) -> None:
        self._store, self.key, self._digest, self._known, self._sources = store, place.key, digest, known, sources
        self.run = os.urandom(16).hex()
        self.own = self.shared = False

    def read(self) -> dict[str, str] | None:
        """What the claim that is there says; None where there is none."""
        found = self._store.head(self.key)
        return None if found is None else note_says(self._store, found)

    def says(self, **more: str) -> bytes:
        """What the claim of this run says, and more."""
        told = {name: json.dumps(digits) for name, digits in (("pins", self._pins), ("states", self._states))}
        told = {name: said for name, said in told.items() if 2 < len(said) < MOST_SAID // 3}
        return json.dumps({"plan": self._digest(), "run": self.run, **self._inputs_here, **told, **more}).encode()

    @cached_property
    def _pins(self) -> dict[str, str]:
        """The small files of the inputs, by the first digits of what the plan says of them: for who goes on with other ones."""
        return _digits(self._known)

    @cached_property
    def _states(self) -> dict[str, str]:
        """The inputs that lie on this machine, by the first digits of their states."""
        return _digits(states_here(self._here))

    @property
    def _here(self) -> list[Source]:
        return [source for _, source in sorted(self._sources.items()) if source.path is not None]

    def other_pin(self, said: Mapping[str, str]) -> str | None:
        """The small file that is another than that of a run which claimed the output."""
        return _other(said.get("pins", "{}"), self._pins)

    def changed_here(self, said: Mapping[str, str] | None = None) -> str:
        """What input on this machine is another than that of the run which claimed the output, as the subject of a sentence.

        Args:
            said: what its claim says, if that was read already.
        """
        said = (self.read() or {}) if said is None else said
        name = _other(said.get("states", "{}"), self._states)
        return "inputs here" if name is None else name

    @cached_property
    def _inputs_here(self) -> dict[str, str]:
        """The state of the inputs that lie on this machine, and its name: the plan need not know all their values.
        Nothing where all lie in stores, which know an object by its ETag.
        """
        said = json.dumps(self._states, sort_keys=True).encode()
        return {"host": socket.gethostname(), "inputs": hashlib.sha256(said).hexdigest()[:32]} if self._here else {}

    def is_changed(self, said: Mapping[str, str]) -> bool:
        """Whether inputs on this machine are others than when a claim was made here."""
        here = self._inputs_here
        return said.get("host") == here.get("host") and said.get("inputs") != here.get("inputs")

    def is_ours(self, said: Mapping[str, str]) -> bool:
        """Whether a claim is that of this run; of workers of one plan, that of the plan."""
        return said.get("plan") == self._digest() and (self.shared or said.get("run") == self.run)
