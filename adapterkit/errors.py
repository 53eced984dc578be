"""Every error adapterkit raises on purpose.

AdapterkitError                    exit 1   anything below; one sentence: what, where, what to do
├── CheckpointError                exit 1   a checkpoint that is damaged, incomplete or not what it says
├── AdapterError                   exit 1   an adapter that is damaged, incomplete or not understood
│   └── UnsupportedAdapter         exit 1   understood, and not mergeable: the sentence gives the way out
├── TargetError                    exit 1   adapter and base do not fit together
├── OutOfMemory                    exit 1   memory ran out, or would
├── OutputError                    exit 1   the result cannot be written where it was asked for
├── RegistryError                  exit 1   a record, blob, alias or bundle that is damaged or not understood
├── UsageError                     exit 2   arguments that contradict each other
│   ├── MissingPackage             exit 2   what was asked for needs a package that is not installed
│   └── RecipeError                exit 2   a recipe that cannot be understood or carried out
├── CheckFailed                    exit 3   a check or verification did not hold
├── AuthError                      exit 4   the Hub wants a token or a store credentials, or others
├── HubError                       exit 5   the network or the Hub failed
│   └── ServerError                exit 5   a server or an OCI registry did not answer, or went wrong
├── StoreError                     exit 5   the network or an object store failed
├── UnsafeError                    exit 6   refused: a path out of its folder, a pickle, remote code
└── NotFound                       exit 7   a file, a name or a repository that does not exist
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


def _in_python(name: str, value: object) -> str:
    """``weight=``, ``quant='Q8_0'``, ``force=True``"""
    return f"{name}={'' if value is None else repr(value)}"


# Of the process and not of a context: worker threads speak as the door does that started them.
_SPELLING: list[Callable[[str, object], str]] = [_in_python]


def option(name: str, value: object = None) -> str:
    """An option as the user's own door spells it: ``--max-shard-size 2GB``, or ``max_shard_size='2GB'`` in Python.

    Args:
        name: of the field or keyword.
        value: what to give it; True for one that is only switched on.
    """
    return _SPELLING[-1](name, value)


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint on a word that is none of those known: the one that is most like it; else ``otherwise``, or all of them."""
    words = [*map(str, known)]
    close = most_like(word, words)
    return f"did you mean '{close}'?" if close else otherwise or f"use {', '.join(words)}"


# What other tools call our values.
SAME: dict[str, tuple[str, ...]] = {
    "f16": ("half", "fp16", "float16", "torch.float16", "16bit"),
    "bf16": ("bfloat16", "torch.bfloat16", "bfloat"),
    "f32": ("float", "float32", "fp32", "torch.float32", "single"),
    "nf4": ("4bit", "bnb", "bitsandbytes", "merged-4bit", "merged-4bit-forced"),
    "hf": ("huggingface", "transformers"),
    "gguf-lora": ("lora-gguf",),
}


def most_like(word: str, known: Iterable[str]) -> str:
    """The known word that is meant: by the name that other tools have for it, or by its letters; empty where none is near."""
    import difflib

    said = word.lower().replace("_", "-")
    words = {one.lower().replace("_", "-"): one for one in known}
    meant = next((ours for ours, theirs in SAME.items() if said in theirs), "")
    if meant in words:
        return words[meant]
    close = difflib.get_close_matches(said, words, n=1)
    return words[close[0]] if close else ""


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: ``1 file``, ``2,000 files``; ``many`` where that is not ``one`` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(nbytes: float) -> str:
    """``1.23 GB``"""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


@contextmanager
def spelled(spelling: Callable[[str, object], str]) -> Iterator[None]:
    """Within the block, sentences spell options as ``spelling`` does."""
    _SPELLING.append(spelling)
    try:
        yield
    finally:
        _SPELLING.pop()


# As above: who hears what is told while something runs. By Python alone nobody does.
_HEARING: list[Callable[[str], None]] = []


def tell(text: str) -> None:
    """A line about what goes on now, such as why nothing seems to; no error, and no part of a result."""
    if _HEARING:
        _HEARING[-1](text)


@contextmanager
def heard(by: Callable[[str], None]) -> Iterator[None]:
    """Within the block, ``by`` gets each line that is told, from whichever thread."""
    _HEARING.append(by)
    try:
        yield
    finally:
        _HEARING.pop()


class AdapterkitError(Exception):
    """Base of all errors; ``hint`` is what to do next, ``exit_code`` what the command line returns.

    ``place`` is the file and the line of it that the error is about, where there is one, for annotations.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", place: tuple[str, int] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.place = place

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class CheckpointError(AdapterkitError):
    """A checkpoint that is damaged, incomplete or not what it says."""


class AdapterError(AdapterkitError):
    """An adapter that is damaged, incomplete or not understood."""


class UnsupportedAdapter(AdapterError):
    """An adapter that is understood and cannot be folded into weights."""


class TargetError(AdapterkitError):
    """Adapter and base do not fit together."""


class OutOfMemory(AdapterkitError, MemoryError):
    """Memory ran out, or would: a limit of the machine, the container or the process is too small."""


class OutputError(AdapterkitError):
    """The result cannot be written where it was asked for."""


class RegistryError(AdapterkitError):
    """A record, blob, alias or bundle that is damaged or not understood."""


class UsageError(AdapterkitError):
    """Arguments that contradict each other."""

    exit_code = 2


class MissingPackage(UsageError):
    """What was asked for needs a package that is not installed; the hint is the command that installs it."""


class RecipeError(UsageError):
    """A recipe that cannot be understood or carried out."""


class CheckFailed(AdapterkitError):
    """A check or verification did not hold."""

    exit_code = 3


class AuthError(AdapterkitError):
    """The Hub wants a token or a store credentials, or others."""

    exit_code = 4


class HubError(AdapterkitError):
    """The network or the Hub failed."""

    exit_code = 5


class ServerError(HubError):
    """A server that runs models, an OCI registry or a tracking server did not answer, or went wrong."""


class StoreError(AdapterkitError):
    """The network or an object store failed."""

    exit_code = 5


class UnsafeError(AdapterkitError):
    """Refused as unsafe: a path out of its folder, a pickle, remote code."""

    exit_code = 6


class NotFound(AdapterkitError):
    """A file, a name or a repository that does not exist."""

    exit_code = 7


_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "failed to map segment",
    "can't start new thread",
    "unable to allocate",
    "pthread_create failed",
)


def no_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that memory or room for threads ran out.

    Libraries say it in their own ways: torch by a RuntimeError, the loader of shared libraries by an ImportError.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == 12):  # ENOMEM
            return True
        if isinstance(error, BlockingIOError) and _of_a_start(error):  # EAGAIN: no more processes for this user
            return True
        if not isinstance(error, AdapterkitError) and any(text in str(error).lower() for text in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _of_a_start(error: BaseException) -> bool:
    """Whether an error was raised where a process is started."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name in ("_execute_child", "_fork_exec", "fork")


def how_it_ended(code: int) -> str:
    """What became of a process of ours, by its exit status."""
    if code >= 0:
        return f"it ended with {code}"
    return f"it was ended by signal {-code}" + (", perhaps since memory ran out" if code == -9 else "")


def out_of_memory(error: BaseException, limit: str = "") -> OutOfMemory:
    """The one sentence about memory that ran out; ``limit`` says who allows how much, where that is known."""
    said = " ".join(str(error).split())[:120]
    return OutOfMemory(
        f"memory ran out ({type(error).__name__}{': ' + said if said else ''}{'; ' + limit if limit else ''})",
        "give fewer jobs, or raise the limit of this process or container",
    )
