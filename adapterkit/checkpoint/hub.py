"""Checkpoints on the Hub, through huggingface_hub and its cache.

A branch is resolved to its commit first and everything after that uses the commit, so that a stale cache entry is never
taken for today's ``main``. With ``headers_only`` weight files are read by HTTP range and never downloaded.
"""

from __future__ import annotations

import glob
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.files import FirstSeen, LocalFile, Source
from adapterkit.checkpoint.folder import (
    ADAPTER_CONFIG,
    ADAPTER_INDEX,
    ADAPTER_WEIGHTS,
    PICKLES,
    RECORD,
    adapter_names,
    read_index,
    side_names,
    weight_names,
)
from adapterkit.checkpoint.hub_bytes import Stated, cached_digest, check_bytes, stated_of
from adapterkit.checkpoint.listing import Listing, LocalFolder
from adapterkit.errors import AdapterkitError, AuthError, CheckpointError, HubError, NotFound
from adapterkit.foreign import is_whole
from adapterkit.places import HUB, Address

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from adapterkit.checkpoint.hub_ref import HubRef

FIRST_BYTES = 1 << 17  # one request fetches a header of up to this size whole
PARALLEL = 16
MAX_ERROR = 1 << 16  # bytes of an error's text
RETRIES = 3  # of one request, when the server is busy or the connection drops
SILENCE = 120.0  # seconds for which the Hub may say nothing; huggingface_hub by itself waits for ever

# A weight file is only read where headers are wanted, so these never come down with the side files.
_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".tflite")


@contextmanager
def hub_errors(what: str, may: str = "read") -> Iterator[None]:
    """Turn huggingface_hub's exceptions into ours; ``what`` names the repository, ``may`` what a token must allow."""
    from huggingface_hub import errors as hf

    try:
        with _patience():
            yield
    except AdapterkitError:
        raise
    except hf.HFValidationError:
        raise NotFound(f"{what} is no repository name", "it looks like org/name") from None
    except hf.GatedRepoError:
        raise AuthError(f"{what} is gated", "accept its terms on the Hub and set HF_TOKEN") from None
    except hf.RepositoryNotFoundError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise AuthError(
                f"the Hub does not show {what} to this user", "check the name, and set HF_TOKEN if it is private"
            ) from None
        raise NotFound(f"{what} is not on the Hub", "check the spelling of the repository") from None
    except hf.RevisionNotFoundError:
        raise NotFound(f"{what} has no such revision", "check the branch, tag or commit") from None
    except (hf.EntryNotFoundError, hf.LocalEntryNotFoundError):
        raise HubError(
            f"{what} cannot be reached and is not in the cache", "check the network, or download it"
        ) from None
    except hf.OfflineModeIsEnabled:
        raise HubError(f"{what} is not in the cache and the Hub is switched off", "unset HF_HUB_OFFLINE") from None
    except hf.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise AuthError(
                f"the Hub refused {what} ({status})", f"set HF_TOKEN to a token that may {may} it"
            ) from None
        raise HubError(f"the Hub failed on {what} ({status or error})", "try again later") from None
    except OSError as error:
        raise HubError(f"{what} could not be fetched ({error})", "check the network and try again") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if not _inside_the_client(error):
            raise
        said = f"the Hub's answer about {what} cannot be understood ({type(error).__name__})"
        raise HubError(said, "check the endpoint ($HF_ENDPOINT)") from None
    except Exception as error:
        # The client's transport errors (connection refused, timeouts) derive from its HTTP library, whose name changes
        # between releases; anything else is a bug of ours and keeps its traceback.
        if type(error).__module__.partition(".")[0] in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "requests",
            "urllib3",
        ):
            raise HubError(f"the Hub could not be reached for {what} ({error})", "check the network") from None
        raise


@contextmanager
def _patience() -> Iterator[None]:
    """Give the client of huggingface_hub a limit to wait, where it has none (from release 1.0 on it is one for the process)."""
    import huggingface_hub as hf

    client = hf.get_session() if hasattr(hf, "get_session") else None
    before = getattr(client, "timeout", None)
    if client is None or before is None or before.read is not None:
        yield
        return
    client.timeout = type(before)(SILENCE)
    try:
        yield
    finally:
        client.timeout = before


def _inside_the_client(error: BaseException) -> bool:
    """Whether an error came up where an answer of the Hub is read, and not in our own code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    client = (
        "huggingface_hub",
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "json",
        "dataclasses",
        "urllib",
        "encodings",
        "codecs",
    )
    return name.partition(".")[0] in client


def hub_listing(ref: HubRef, *, headers_only: bool) -> Listing:
    """The files of a repository at one commit.

    Raises:
        AuthError, HubError, NotFound
        CheckFailed: bytes that are not those of the commit.
    """
    import huggingface_hub as hf
    from huggingface_hub import constants

    shown = f"{ref.repo}{'/' + ref.subfolder if ref.subfolder else ''}{'@' + ref.revision if ref.revision else ''}"
    with hub_errors(shown):
        if constants.HF_HUB_OFFLINE:
            folder = hf.snapshot_download(ref.repo, revision=ref.revision, local_files_only=True)
            found = _snapshot(folder, ref, shown)
            # Nobody can be asked now; the cache calls a large file by the digest that it was downloaded by.
            large = {name: found.path / name for name in found.names if cached_digest(found.path / name)}
            check_bytes(shown, Path(folder).name, large, {})
            return found
        info = repo_info(ref.repo, ref.revision)
        commit = info.sha
        prefix = f"{ref.subfolder}/" if ref.subfolder else ""
        names = {s.rfilename.removeprefix(prefix) for s in info.siblings or () if s.rfilename.startswith(prefix)}
        names = {name for name in names if name.count("/") <= 2 and not name.startswith(".")}
        if not names:
            raise NotFound(f"{shown} has no such folder", "check the sub-folder's name")
        stated = {name.removeprefix(prefix): one for name, one in stated_of(info.siblings).items()}
        listing = HubFolder(ref, commit, frozenset(names), shown, stated)
        files = _wanted(listing)
        wanted = [glob.escape(prefix + name) for name in files]
        if headers_only or not wanted:
            return listing
        # By the name that was asked for, so that the cache knows it when the network is gone.
        folder = hf.snapshot_download(ref.repo, revision=ref.revision, allow_patterns=wanted)
        if Path(folder).name != commit:
            folder = hf.snapshot_download(ref.repo, revision=commit, allow_patterns=wanted)
        found = _snapshot(folder, ref, shown)
        check_bytes(shown, commit, {n: found.path / n for n in files if (found.path / n).is_file()}, stated)
        return found


def repo_info(repo: str, revision: str | None) -> Any:
    """What the Hub says of a repository at a revision: ``sha``, and ``siblings`` with sizes and digests. Call it within
    `hub_errors`.

    Raises:
        HubError: the answer makes no sense.
    """
    import re

    import huggingface_hub as hf

    info = hf.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=SILENCE)
    siblings = info.siblings or ()
    plain = all(isinstance(s.rfilename, str) and isinstance(s.size, int | None) for s in siblings)
    if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40}", info.sha) or not plain:
        raise HubError(
            f"the Hub names no commit of {repo}, or files without names", "check the endpoint ($HF_ENDPOINT)"
        )
    return info


def file_digests(repo: str, commit: str) -> dict[str, str]:
    """sha256 of every large file of a repository at a commit, as the Hub states them: one request, no download.

    Raises:
        AuthError, HubError, NotFound
    """
    with hub_errors(f"{repo}@{commit}"):
        info = repo_info(repo, commit)
        return {s.rfilename: s.lfs.sha256 for s in info.siblings or () if s.lfs is not None}


def _wanted(listing: Listing) -> list[str]:
    """The files to download: the weights that will be read, and what travels with them; nothing if there are no weights.

    Repositories hold the same weights many times over (GGUF, ONNX, consolidated files).
    """
    names = listing.names
    loose = {name for name in names if name.endswith(".safetensors") and "/" not in name}
    single, index = weight_names(names)
    if single in names:
        weights = {single}
    elif index in names:
        weights = {index, *read_index(listing, index).values()} & names
    else:
        weights = loose
    if ADAPTER_CONFIG in names:  # the folders beside an adapter are checkpoints of its training
        weights = loose & {ADAPTER_WEIGHTS}
        if not weights and ADAPTER_INDEX in names:
            weights = {ADAPTER_INDEX, *read_index(listing, ADAPTER_INDEX).values()} & names
        return sorted({ADAPTER_CONFIG, *weights, *adapter_names(names, weights)} if weights else ())
    # The record is not carried to what is made of a model, but says how the model was made.
    return sorted({*weights, *side_names(names, weights), *({RECORD} & names)}) if weights else []


def _snapshot(folder: str, ref: HubRef, shown: str) -> LocalFolder:
    path = Path(folder)
    return HubSnapshot(path / ref.subfolder if ref.subfolder else path, ref, shown, path.name)


class HubSnapshot(LocalFolder):
    """A repository at one commit, in the cache. The Hub may copy its files into a bucket by itself."""

    def __init__(self, path: Path, ref: HubRef, shown: str, commit: str) -> None:
        super().__init__(path, shown, commit)
        self._there = _There(ref, commit, self.names, shown)

    def _file(self, path: Path, shown: str, name: str) -> LocalFile:
        return _HubCopy(self._there, path, shown, name)


class _There:
    """The files of a repository at a commit, as the Hub's store of bytes has them."""

    def __init__(self, ref: HubRef, commit: str, names: Iterable[str], shown: str) -> None:
        self._ref, self.commit, self._names, self._shown = ref, commit, frozenset(names), shown
        self._hashes: dict[str, str] = {}

    def address(self, name: str) -> Address:
        """Where the Hub has a file."""
        path = f"{self._ref.subfolder}/{name}" if self._ref.subfolder else name
        return Address(HUB, f"models/{self._ref.repo}", path)

    def hash(self, address: Address) -> str:
        """By what the store of bytes knows a file, asked for once for all weights; empty where it has it not."""
        import huggingface_hub as hf

        if address.key not in self._hashes:
            wanted = {address.key, *(self.address(name).key for name in self._names if name.endswith(_WEIGHTS))}
            with hub_errors(self._shown):
                found = hf.HfApi().get_paths_info(self._ref.repo, sorted(wanted), revision=self.commit)
            hashes = {one.path: str(getattr(one, "xet_hash", None) or "") for one in found}
            self._hashes = {**dict.fromkeys(wanted, ""), **hashes}
        return self._hashes[address.key]


class _HubCopy(LocalFile):
    """A file of a repository in the cache."""

    def __init__(self, there: _There, path: Path, shown: str, name: str) -> None:
        super().__init__(path, shown)
        self.stored_at, self._there, self.commit = there.address(name), there, there.commit

    def stored_as(self) -> str:
        return "" if self.stored_at is None else self._there.hash(self.stored_at)


class HubFolder(Listing):
    """A repository at one commit whose weights are read by range and whose small files come through the cache."""

    def __init__(
        self, ref: HubRef, commit: str, names: frozenset[str], shown: str, stated: Mapping[str, Stated]
    ) -> None:
        self._hub, self.commit, self._names, self.ref, self._stated = ref, commit, names, shown, stated
        self._open: dict[str, Source] = {}
        self._read: list[FirstSeen] = []
        self._there = _There(ref, commit, names, shown)

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def prefetch(self, names: Iterable[str]) -> None:
        missing = [name for name in names if name in self._names and name not in self._open]
        with ThreadPoolExecutor(PARALLEL) as pool:
            self._open.update(zip(missing, pool.map(self._fetch, missing), strict=True))

    def open(self, name: str) -> Source:
        if name not in self._names:
            raise NotFound(f"{self.ref}/{name} does not exist", "check the repository's files")
        if name not in self._open:
            self._open[name] = self._fetch(name)
        return self._open[name]

    def _fetch(self, name: str) -> Source:
        import huggingface_hub as hf

        path = f"{self._hub.subfolder}/{name}" if self._hub.subfolder else name
        shown = f"{self.ref}/{name}"
        with hub_errors(shown):
            if not name.endswith(_WEIGHTS):
                local = Path(hf.hf_hub_download(self._hub.repo, path, revision=self.commit))
                check_bytes(self.ref, self.commit or "", {name: local}, self._stated)
                small = LocalFile(local, shown)
                self._read.append(small.seen)
                return small
            url = hf.hf_hub_url(self._hub.repo, path, revision=self.commit)
            return HubFile(url, shown, self._there, name, self._read)


class _Interrupted(Exception):
    """A body that ended too early."""


def _some(response: Any, skip: int, length: int) -> bytes:
    """``length`` bytes of a body behind the first ``skip``; the rest is left where it is."""
    data = bytearray()
    for chunk in response.iter_raw(1 << 16):
        part = chunk[skip:]
        skip -= len(chunk) - len(part)
        data += part[: length - len(data)]
        if len(data) >= length:
            break
    return bytes(data)


class HubFile(Source):
    """A file on the Hub, read by HTTP range; its first bytes are kept, for that is where a header lies."""

    def __init__(
        self, url: str, name: str, there: _There | None = None, own: str = "", beside: Sequence[FirstSeen] = ()
    ) -> None:
        self.url, self.name, self.path, self._there, self.beside = url, name, None, there, beside
        self.stored_at = None if there is None else there.address(own)
        self.commit = "" if there is None else there.commit
        self._head, self.size = self._range(0, FIRST_BYTES)

    def _range(self, offset: int, length: int) -> tuple[bytes, int]:
        """``length`` bytes at ``offset``, fewer at the end, and the size of the whole file. However much a server sends,
        no more than that is kept."""
        with hub_errors(self.name):
            for left in range(RETRIES, -1, -1):
                try:
                    return self._request(offset, length)
                except _Interrupted as error:
                    if not left:
                        raise HubError(f"{self.name} could not be fetched ({error})", "check the network") from None
        raise AssertionError("unreachable")

    def _request(self, offset: int, length: int) -> tuple[bytes, int]:
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        headers = {
            **build_hf_headers(),
            "Range": f"bytes={offset}-{offset + length - 1}",
            "Accept-Encoding": "identity",
        }
        fault: Exception | None = None
        data, total = bytearray(), ""
        # The session follows redirects to the storage host and drops the token on the way.
        with http_stream_backoff(
            "GET", self.url, headers=headers, follow_redirects=True, max_retries=RETRIES
        ) as response:
            try:
                if response.status_code >= 400:
                    # What the error says is read to its end by those who look at it.
                    response._content = _some(response, 0, MAX_ERROR)
                else:
                    said = response.headers.get("Content-Range", "")
                    total = said.rpartition("/")[2]
                    skip = 0
                    if response.status_code != 206 or not is_whole(total):
                        # A server without ranges sends the whole file.
                        total, skip = response.headers.get("Content-Length", ""), offset
                    elif not said.startswith(f"bytes {offset}-"):
                        raise HubError(f"the Hub sent another part of {self.name} than was asked for", "try again")
                    data += _some(response, skip, length)
            except AdapterkitError:
                raise
            except Exception as error:  # dropped in the middle; the client cannot try that again
                fault = error
        if response.status_code >= 400:
            hf_raise_for_status(response)
        if not is_whole(total) or len(total) > 15:
            raise HubError(f"the Hub does not say how large {self.name} is", "try again, or use another endpoint")
        if fault is not None or len(data) < min(length, int(total) - offset):
            raise _Interrupted(str(fault or "it ended too early"))
        return bytes(data), int(total)

    def stored_as(self) -> str:
        return "" if self._there is None or self.stored_at is None else self._there.hash(self.stored_at)

    def read(self, offset: int, length: int) -> bytes:
        if length <= 0 or offset >= self.size:
            return b""
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        data, size = self._range(offset, length)
        if size != self.size:
            raise CheckpointError(f"{self.name} changed while it was read", "try again")
        return data
