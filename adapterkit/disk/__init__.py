"""The one way to publish files and folders.

What this package promises, whatever lies on the disk before a run and whatever kills it:

* a file or folder appears under its name whole or not at all: written under another name, put on disk, renamed, and then
  the folder's entry is put on disk;
* nothing is written through a link. Temporary files have names that nobody can guess and are made with ``O_EXCL`` and
  ``O_NOFOLLOW``, relative to a handle of their folder; a working folder is used again only if it is a real folder that
  belongs to this user and carries our mark (see `adapterkit.disk.folders`);
* what a file system or an operating system lacks (``flock``, hard links, ``renameat2``, ``copy_file_range``, ``fsync`` of
  folders, ``fcntl`` altogether) has a second way, with the same bytes in the end.

Modules: `calls` (what the system offers), `files` (small files), `folders` (working folders and their publication),
`locks`, and `copying` (bytes from file to file, with their hash).
"""

from adapterkit.disk.calls import fsync
from adapterkit.disk.copying import FICLONE, copy_and_hash, copy_range, flushing, hash_file, reflink
from adapterkit.disk.files import (
    deliver,
    fresh,
    make_folder,
    open_appended,
    open_inside,
    open_kept_inside,
    open_new_inside,
    open_regular,
    open_shared_inside,
    publish_new,
    publish_over,
    read_inside,
    read_regular,
    refused,
    staged,
    sync,
    sync_folder,
    sync_tree,
    write_all,
    write_file,
    write_inside,
    writing,
)
from adapterkit.disk.folders import (
    is_busy,
    is_of_user,
    is_own,
    own_folder,
    partial_folder,
    publish,
    publish_files,
    recover,
    staging,
)
from adapterkit.disk.locks import LOCK_SECONDS, locked

__all__ = [
    "FICLONE",
    "LOCK_SECONDS",
    "copy_and_hash",
    "copy_range",
    "deliver",
    "flushing",
    "fresh",
    "fsync",
    "hash_file",
    "is_busy",
    "is_of_user",
    "is_own",
    "locked",
    "make_folder",
    "open_appended",
    "open_inside",
    "open_kept_inside",
    "open_new_inside",
    "open_regular",
    "open_shared_inside",
    "own_folder",
    "partial_folder",
    "publish",
    "publish_files",
    "publish_new",
    "publish_over",
    "read_inside",
    "read_regular",
    "recover",
    "reflink",
    "refused",
    "staged",
    "staging",
    "sync",
    "sync_folder",
    "sync_tree",
    "write_all",
    "write_file",
    "write_inside",
    "writing",
]
