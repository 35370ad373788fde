"""The route by files: a Hugging Face folder that the servers read, for machines that share nothing but a file system.

This module does not choose the route (see `route_choice`). Invariants: a server is asked to load a folder only after
all of its files are on the disk. A folder has a random name, and is removed when the next one has been loaded, at
`close` and after a failure. What a killed job leaves there is not removed: another job may use the same place.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path

from tropd_mcore.errors import ServerError, TropdError
from tropd_mcore.files import shown
from tropd_mcore.serving.background import at_once
from tropd_mcore.serving.weight_payload import storage_of_its_own
from tropd_mcore.serving.weight_routes import Bucket, Errors, Receivers
from tropd_mcore.weights.hf_folder import FolderWriter

log = logging.getLogger(__name__)

PREFIX = "tropd-weights-"
"""Begins the name of each folder."""


class DiskRoute:
    """Writes each update into a new folder inside `parent`, which all servers see under this path.

    Everything but the weights comes from `source`, the student's folder. Sends nothing before `finish`.
    """

    in_session = False

    def __init__(self, parent: Path, source: Path) -> None:
        self._parent = parent
        self._source = source
        self._writer: FolderWriter | None = None
        self._loaded: Path | None = None

    def limit(self, bucket_bytes: int, receivers: Receivers) -> int:
        """Return `bucket_bytes`: one bucket is one file."""
        return bucket_bytes

    def open(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Make the folder."""
        self._drop()
        folder = self._parent / f"{PREFIX}{secrets.token_hex(6)}"
        try:
            folder.mkdir()
        except OSError as error:
            return self._of_all(receivers, f"cannot make a folder in {shown(self._parent)}: {error.strerror}")
        self._writer = FolderWriter(folder, self._source)
        return {}

    def send(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """Write the bucket as one file."""
        assert self._writer is not None
        try:
            self._writer.add({name: storage_of_its_own(tensor) for name, tensor in bucket})
        except TropdError as error:
            self._drop()
            return self._of_all(receivers, str(error))
        return {}

    def repair(self, bucket: Bucket, receivers: Receivers, version: str) -> Errors:
        """No server keeps another from loading."""
        return {}

    def finish(self, receivers: Receivers, version: str) -> Errors:
        """Complete the folder and let the servers load it."""
        assert self._writer is not None
        folder = self._writer.folder
        try:
            self._writer.finish()
        except TropdError as error:
            self._drop()
            return self._of_all(receivers, str(error))
        calls = {
            receiver.key: partial(receiver.client.update_weights_from_disk, folder, version=version)
            for receiver in receivers
        }
        failed = {
            key: type(error)(f"{error} (its machine must see the folder {shown(folder)}; {key}.weights_folder)")
            for key, error in at_once(calls)[1].items()
        }
        if self._loaded is not None:
            _remove(self._loaded)
        self._loaded, self._writer = folder, None
        return failed

    def close(self, untold: Collection[str] = ()) -> None:
        """Remove the folders. The servers have read them."""
        self._drop()
        if self._loaded is not None:
            _remove(self._loaded)
            self._loaded = None

    def _drop(self) -> None:
        """Remove the folder that is being written."""
        if self._writer is not None:
            _remove(self._writer.folder)
            self._writer = None

    def _of_all(self, receivers: Receivers, problem: str) -> Errors:
        return {
            receiver.key: ServerError(f"{receiver.key}: {problem} ({receiver.key}.weights_folder)")
            for receiver in receivers
        }


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("the weights in %s could not be removed: %s", shown(folder), error.strerror)
