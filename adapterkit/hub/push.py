"""`push`: a version becomes one commit of a repository on the Hub, then a tag.

Nothing is sent that the repository has already, so that a push that was cut off anywhere, even after the commit and
before its answer, is finished by pushing again. A commit names the one before it: whoever was faster is not overwritten.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint import hub
from adapterkit.checkpoint.hub import hub_errors
from adapterkit.errors import (
    CheckFailed,
    HubError,
    NotFound,
    OutputError,
    RegistryError,
    UnsafeError,
    UsageError,
    option,
)
from adapterkit.hub.card import card
from adapterkit.hub.files import CARD, Prepared, Upload, prepare
from adapterkit.places import address_of, local
from adapterkit.registry import blobs, resolve
from adapterkit.registry.beside import check_beside, read_beside
from adapterkit.registry.canonical import parse, sha256
from adapterkit.registry.gather import describe, gather
from adapterkit.registry.home import open_home
from adapterkit.registry.names import check_path, is_repo
from adapterkit.registry.record import BESIDE, FileEntry, Record
from adapterkit.stores.files import brought_folder, called

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now.

    Attributes:
        repo, commit, url: where.
        new: whether a commit was made; False when all of it was there.
        uploaded, deleted: names of files that changed.
        left_out: files of the version that are not published.
        tag: the tag that points to the commit.
        pull_request: its address, when one was asked for.
        content: digest of what was published.
        notes: what a user should know.
    """

    repo: str
    commit: str
    url: str
    new: bool
    uploaded: tuple[str, ...]
    deleted: tuple[str, ...]
    left_out: tuple[str, ...]
    tag: str | None
    pull_request: str | None
    content: str
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The address of the pull request, or of the repository."""
        return self.pull_request or self.url


def push(
    ref: str,
    repo: str,
    *,
    private: bool = False,
    tag: str | None = None,
    create_pr: bool = False,
    base_id: str = "",
    replace_card: bool = False,
    home: Path | None = None,
) -> Pushed:
    """Publish a version (or a folder) to a model repository, which is made when it does not exist.

    Args:
        ref: a registry name, or a folder.
        repo: ``org/name``.
        private: make a new repository private, and refuse one that is public.
        tag: a tag to set; one that points elsewhere is never moved.
        create_pr: propose the commit in a pull request.
        base_id: the Hub id of the base, where the record does not know it.
        replace_card: use the version's own card as prose instead of the one on the Hub.

    Raises:
        UnsafeError: a link, a secret, a path of this machine, or a public repository where ``private`` was asked for.
        AuthError, HubError: the Hub said no, failed, or somebody else was faster.
        OutputError: the tag exists elsewhere.
        NotFound, RegistryError, CheckFailed, UsageError
    """
    if not is_repo(repo) or "/" not in repo:
        raise UsageError(f"'{repo}' is not a repository", "give it as org/name")
    record, files = source_of(ref, home)
    if base_id:
        record = with_base(record, base_id)
    ready = prepare(record, files)
    with hub_errors(repo, "write"):
        return _Push(repo, ready, tag, replace_card).run(private, create_pr)


class _Push:
    def __init__(self, repo: str, ready: Prepared, tag: str | None, replace_card: bool) -> None:
        import huggingface_hub as hf

        self.api = hf.HfApi()
        self.repo, self.ready, self.tag, self.replace_card = repo, ready, tag, replace_card
        self.title = f"{ready.record.kind} sha256:{ready.record.content[:12]}, by adapterkit"

    def run(self, private: bool, create_pr: bool) -> Pushed:
        head = self._repository(private, create_pr)
        there = digests(head)
        uploads = (*self.ready.uploads, self._card(head, there))
        stale = self._stale(head, there, {upload.path for upload in uploads})
        changed = tuple(upload for upload in uploads if there.get(upload.path) not in _spellings(upload))
        self._check_tag(None if changed or stale else head.sha)
        commit, url, proposal = head.sha, f"{self.api.endpoint}/{self.repo}/commit/{head.sha}", None
        if (changed or stale) and create_pr:
            found = self._open_proposal(uploads, stale) or self._commit(changed, stale, head.sha, uploads, True)
            commit, url, proposal = found
        elif changed or stale:
            commit, url, _ = self._commit(changed, stale, head.sha, uploads, False)
        if self.tag is not None:
            self._set_tag(commit)
        return Pushed(
            self.repo,
            commit,
            url,
            bool(changed or stale),
            tuple(upload.path for upload in changed),
            stale,
            self.ready.left_out,
            self.tag,
            proposal,
            self.ready.record.content,
            self.ready.notes,
        )

    def _info(self, revision: str | None = None) -> Any:
        return self.api.model_info(self.repo, revision=revision, files_metadata=True, timeout=hub.SILENCE)

    def _repository(self, private: bool, create_pr: bool) -> Any:
        """The head of the repository, made if it was not there."""
        from huggingface_hub import errors as hf

        try:
            head = self._info()
        except hf.RepositoryNotFoundError as error:
            if create_pr or error.response.status_code in (401, 403):
                raise
            self.api.create_repo(self.repo, private=private, exist_ok=True)
            head = self._info()
        if private and not head.private:
            raise UnsafeError(
                f"{self.repo} is public", f"make it private on the Hub first, or leave out {option('private', True)}"
            )
        return head

    def _card(self, head: Any, there: dict[str, str]) -> Upload:
        existing, where = self.ready.card, CARD
        if CARD in there and not self.replace_card:
            existing, where = self._fetch(CARD, head.sha), f"{self.repo}/{CARD}"
        data = card(self.ready.record, self.repo, existing, where)
        return Upload(CARD, data, len(data), sha256(data))

    def _fetch(self, path: str, commit: str) -> bytes:
        """A small file as it is on the Hub, past every cache."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        url = f"{self.api.endpoint}/{self.repo}/resolve/{commit}/{path}"
        response = get_session().get(url, headers=build_hf_headers(), follow_redirects=True)
        hf_raise_for_status(response)
        return bytes(response.content)

    def _stale(self, head: Any, there: dict[str, str], wanted: set[str]) -> tuple[str, ...]:
        """Files that an earlier push left there and this version does not have, such as a second shard."""
        if BESIDE not in there:
            return ()
        try:
            listed = parse(self._fetch(BESIDE, head.sha), f"{self.repo}/{BESIDE}")["files"]
            names = {check_path(file["path"], BESIDE) for file in listed}
        except (RegistryError, KeyError, TypeError):
            return ()
        return tuple(sorted(names & there.keys() - wanted))

    def _commit(
        self, changed: tuple[Upload, ...], stale: tuple[str, ...], parent: str, uploads: tuple[Upload, ...], pr: bool
    ) -> tuple[str, str, str | None]:
        """One commit; when its answer is lost, a look at the head says whether it was made."""
        import huggingface_hub as hf

        operations: list[Any] = [hf.CommitOperationDelete(path) for path in stale]
        for upload in changed:
            source = upload.source if isinstance(upload.source, bytes) else str(upload.source)
            operation = hf.CommitOperationAdd(upload.path, source)
            if operation.upload_info.sha256.hex() != upload.sha256:
                raise CheckFailed(f"{upload.path} changed while it was being published", "push it again")
            operations.append(operation)
        try:
            made = self.api.create_commit(
                self.repo, operations, commit_message=self.title, parent_commit=parent, create_pr=pr
            )
        except ValueError as error:
            if isinstance(error, hf.errors.HfHubHTTPError):
                raise self._refused(error) from None
            raise RegistryError(
                f"the Hub refused the card of {self.repo} ({error})", "correct its front matter"
            ) from None
        except hf.errors.HfHubHTTPError as error:
            recovered = self._landed(uploads, stale, parent, pr)
            if recovered is None:
                raise self._refused(error) from None
            return recovered
        except Exception as error:
            recovered = self._landed(uploads, stale, parent, pr)
            if recovered is None:
                # The client wraps what failed in an upload.
                raise (error.__cause__ if type(error) is RuntimeError and error.__cause__ else error) from None
            return recovered
        self._verify((made.pr_revision if pr else None) or made.oid, uploads, stale)
        return made.oid, made.commit_url, made.pr_url if pr else None

    def _refused(self, error: Any) -> Exception:
        status = getattr(error.response, "status_code", None)
        if status in (409, 412):
            return HubError(f"somebody else committed to {self.repo} meanwhile", "look at it, and push again")
        return error  # type: ignore[no-any-return]

    def _landed(
        self, uploads: tuple[Upload, ...], stale: tuple[str, ...], parent: str, pr: bool
    ) -> tuple[str, str, str | None] | None:
        """The commit, if it was made all the same."""
        try:
            if pr:
                return self._open_proposal(uploads, stale)
            head = self._info()
        except Exception:
            return None  # whatever failed before is what there is to say
        if head.sha == parent or not _holds(head, uploads, stale):
            return None
        return head.sha, f"{self.api.endpoint}/{self.repo}/commit/{head.sha}", None

    def _open_proposal(self, uploads: tuple[Upload, ...], stale: tuple[str, ...]) -> tuple[str, str, str] | None:
        """An open pull request of ours that proposes exactly this."""
        found = self.api.get_repo_discussions(self.repo, discussion_type="pull_request", discussion_status="open")
        for proposal in found:
            if proposal.title == self.title:
                head = self._info(f"refs/pr/{proposal.num}")
                if _holds(head, uploads, stale):
                    url = f"{self.api.endpoint}/{self.repo}/discussions/{proposal.num}"
                    return head.sha, f"{self.api.endpoint}/{self.repo}/commit/{head.sha}", url
        return None

    def _verify(self, revision: str, uploads: tuple[Upload, ...], stale: tuple[str, ...]) -> None:
        if not _holds(self._info(revision), uploads, stale):
            raise HubError(f"{self.repo} does not hold what was pushed", "look at its files and push again")

    def _check_tag(self, commit: str | None) -> None:
        """
        Raises:
            OutputError: the tag exists and would have to move.
        """
        if self.tag is None:
            return
        at = self._tagged()
        if at is not None and at != commit:
            raise OutputError(
                f"the tag {self.tag} of {self.repo} is at {at[:7]} and is not moved", "choose another tag"
            )

    def _tagged(self) -> str | None:
        refs = self.api.list_repo_refs(self.repo)
        return next((tag.target_commit for tag in refs.tags if tag.name == self.tag), None)

    def _set_tag(self, commit: str) -> None:
        assert self.tag is not None
        if self._tagged() != commit:
            try:
                self.api.create_tag(self.repo, tag=self.tag, revision=commit)
            except Exception:
                if self._tagged() != commit:
                    raise


def digests(info: Any) -> dict[str, str]:
    """Path to the sha256 (large files) or git blob id (small ones) of every file at a commit."""
    return {s.rfilename: s.lfs.sha256 if s.lfs is not None else s.blob_id for s in info.siblings or ()}


def git_blob(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _spellings(upload: Upload) -> tuple[str, ...]:
    """The digests under which the Hub may know a file: it decides which files are large."""
    if isinstance(upload.source, bytes):
        return upload.sha256, git_blob(upload.source)
    if upload.size > _SMALL:
        return (upload.sha256,)
    return upload.sha256, git_blob(upload.source.read_bytes())


_SMALL = 32 << 20


def _holds(info: Any, uploads: tuple[Upload, ...], stale: tuple[str, ...]) -> bool:
    there = digests(info)
    return all(there.get(u.path) in _spellings(u) for u in uploads) and not any(path in there for path in stale)


def source_of(ref: str, home: Path | None) -> tuple[Record, list[tuple[FileEntry, Path]]]:
    """The record of what is to be published and where its files are.

    Raises:
        NotFound: bytes that are not there.
        UnsafeError: a folder that holds a link.
    """
    address = address_of(ref)
    if address is not None:
        folder = brought_folder(address)
        with called(folder, address):
            return _folder(folder)
    path = Path(local(ref, "what is pushed")).expanduser()
    if path.is_dir():
        return _folder(path)
    at = open_home(home)
    record = resolve.find(at, ref)
    if record.kind == "base":
        raise UsageError(f"{record.ref} is a reference to a base; nothing of it is here", "push what was made of it")
    for file in record.files:
        if not file.stored or not blobs.has(at, file.sha256, file.size):
            raise NotFound(f"{record.ref} has no bytes of {file.path} in {at.root}", "pull or import it first")
    return record, [(file, at.blob(file.sha256)) for file in record.files]


def _folder(path: Path) -> tuple[Record, list[tuple[FileEntry, Path]]]:
    from adapterkit.provenance.record import entry

    found = []
    for inside, _ in gather(path).files:
        if (path / inside).is_symlink():
            raise UnsafeError(f"{path / inside} is a link", "put the file itself in its place, or register it first")
        found.append((entry(inside, path / inside), path / inside))
    files = tuple(file for file, _ in found)
    beside = read_beside(path)
    if beside is not None:
        check_beside(path, beside, files)
        return replace(beside, files=files, name="", version=0), found
    told = describe(path)
    if not told.kind:
        raise UsageError(f"{path} does not tell what it is", f"register it with {option('kind')} and push it by name")
    return Record(told.kind, files, method=told.method, parameters=dict(told.parameters), base=told.base), found


def with_base(record: Record, base_id: str) -> Record:
    from adapterkit.registry.identity import Identity

    if not is_repo(base_id) or "/" not in base_id:
        raise UsageError(f"'{base_id}' is not a Hub id", f"give {option('base_id')} like org/name")
    known = record.base or Identity()
    if known.id not in ("", base_id):
        raise UsageError(
            f"the record says that the base is {known.id}, and not {base_id}", f"leave out {option('base_id')}"
        )
    return replace(record, base=replace(known, id=base_id))
