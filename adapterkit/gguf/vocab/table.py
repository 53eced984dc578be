"""The list of tokens as GGUF has it: text, type and score by id, without gaps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError, counted
from adapterkit.gguf.metadata import Entry, array
from adapterkit.gguf.reader import F32, I32, STRING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.gguf.vocab.sources import AddedToken

# llama_token_type of llama.h; SentencePiece has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"  # SentencePiece's mark for a space
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # the converter's

MOST_ROWS = 1 << 22  # tokens; the largest vocabularies have a million

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TOKENS, SCORES, TYPES, MERGES = (
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
)


@dataclass(frozen=True)
class Vocab:
    """A tokenizer as key-values of GGUF.

    Attributes:
        entries: all ``tokenizer.*`` keys, the chat templates among them.
        size: tokens written, one for each row of the embedding.
        notes: what llama.cpp will do otherwise than the tokenizer, or what was left out.
    """

    entries: tuple[Entry, ...]
    size: int
    notes: tuple[str, ...] = ()


def padding(number: int) -> str:
    """The name of a row that no token belongs to."""
    return f"[PAD{number}]"


@dataclass
class TokenTable:
    """Tokens by id, while they are gathered."""

    texts: dict[int, str] = field(default_factory=dict)
    types: dict[int, int] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, number: int, text: str, kind: int = NORMAL, score: float = 0.0) -> None:
        self.texts[number], self.types[number], self.scores[number] = text, kind, score

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Put added tokens over what the model's own vocabulary says.

        A user-defined token is found in the text as it stands, so SentencePiece's mark in it becomes a space again.
        """
        for token in tokens:
            text = token.content if token.control else token.content.replace(SPACE, " ")
            kind = CONTROL if token.control else USER_DEFINED
            if (self.texts.get(token.id), self.types.get(token.id)) != (text, kind):
                self.put(token.id, text, kind, ADDED_SCORE)

    def ids(self) -> dict[str, int]:
        """Ids by text."""
        return {text: number for number, text in self.texts.items()}

    def fit(self, rows: int, added: Iterable[int]) -> None:
        """As many tokens as the embedding has rows: fewer are padded, added ones beyond it are left out.

        Raises:
            CheckpointError: the model's own vocabulary is larger than the embedding, there are more tokens than any model
                has, or a token appears twice.
        """
        if rows > MOST_ROWS:  # an embedding without columns may have any number of rows
            raise CheckpointError(
                f"there are {rows:,} tokens, and no model has more than {MOST_ROWS:,}", "copy it again"
            )
        beyond = sorted(number for number in self.texts if number >= rows)
        foreign = set(beyond) - set(added)
        if foreign:
            raise CheckpointError(
                f"the tokenizer has {max(self.texts) + 1} tokens and the embedding {rows} rows",
                "use the tokenizer that the model was trained with",
            )
        if beyond:
            names = ", ".join(repr(self.texts[number]) for number in beyond[:3])
            more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
            self.notes.append(
                f"{names}{more} left out: the embedding ends at row {rows - 1}, so nothing can be said of them"
            )
            for number in beyond:
                del self.texts[number], self.types[number], self.scores[number]
        missing = [number for number in range(rows) if number not in self.texts]
        for number in missing:
            self.put(number, padding(number), UNUSED, PADDING_SCORE)
        if missing:
            some = counted(len(missing), "row of the embedding has", "rows of the embedding have")
            self.notes.append(f"{some} no token, and the name of padding")
        self._check_unique()

    def _check_unique(self) -> None:
        # llama.cpp ends the process when two tokens have one text.
        seen: dict[str, int] = {}
        for number in sorted(self.texts):
            text = self.texts[number]
            if text in seen:
                raise CheckpointError(
                    f"tokens {seen[text]} and {number} are both {text!r}, which llama.cpp cannot load",
                    "remove one of them from the tokenizer",
                )
            seen[text] = number

    def entries(self, *, scores: bool) -> list[Entry]:
        order = range(len(self.texts))
        found = [array(TOKENS, STRING, [self.texts[number] for number in order])]
        if scores:
            found.append(array(SCORES, F32, [self.scores[number] for number in order]))
        return [*found, array(TYPES, I32, [self.types[number] for number in order])]
