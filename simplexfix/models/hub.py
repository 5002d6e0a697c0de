"""Downloads models and adapters from the Hugging Face hub into the client's cache, and pushes them in one commit.

The client, huggingface_hub, is optional (the extra `hub`) and imported on first use.  It downloads only `config.json`
and the weights, a safetensors file.  Nothing is unpickled, and no code of a repository is executed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._config import FolderFormat, check_ours
from .identity import ModelIdentity

__all__ = ["folder_of", "push"]

_LIBRARY = "simplexfix"  # name of this package for the hub's statistics
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_INSTALL = "pip install 'simplexfix[hub]'"


def folder_of(source: str | os.PathLike[str], revision: str | None, written: FolderFormat) -> Path:
    """Returns the local folder of a model: `source` itself, or the cached snapshot of the repository with that id.

    The hub is not used for a path that exists, for a `Path`, or for a string that is not of the form "owner/name".

    Args:
        source: a local folder, or "owner/name".
        revision: branch, tag or commit of the repository; None for its main branch.
        written: format of the files to download.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a repository or revision.
        ConnectionError: the hub cannot be reached or a download broke off, and the cache does not have the files.
        ValueError: `revision` is given for a local folder.
    """
    folder = Path(source)
    if folder.exists() or not isinstance(source, str) or not _REPOSITORY.fullmatch(source):
        if revision is not None:
            raise ValueError(
                f"revision must be None for the local folder {folder}, which holds one model, got {revision!r}"
            )
        return folder
    try:
        hub = _imported()
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is not a folder; repositories of the Hugging Face hub need huggingface_hub: {_INSTALL}"
        ) from error
    errors, place = hub.errors, hub.constants.ENDPOINT
    patterns = ["config.json", f"{written.kind}-*.safetensors"]
    try:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=patterns, library_name=_LIBRARY))
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the repository {source} at {place} has no revision {revision!r}; expected a branch, a tag or a commit's "
            "hash"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is neither a local folder nor a repository at {place} that you may read; check the name, and "
            "for a private repository log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:  # HTTPError: base class of its HTTP errors
        raise ConnectionError(
            f"{source} is not a local folder, its files at {place} could not be downloaded, and the cache does not "
            f"have all of them; check the network and HF_HUB_OFFLINE, and try again: {error}"
        ) from error


def push(
    repo_id: str,
    written: FolderFormat,
    save: Callable[[Path], ModelIdentity],
    card: Callable[[ModelIdentity, str], str],
    *,
    private: bool | None,
) -> str:
    """Saves a model or adapter to a repository of the hub, as one commit, and returns the commit's hash.

    The commit replaces the earlier model and its card; other files stay.

    Args:
        repo_id: "owner/name", or "name" for the user who is logged in; created if missing.
        written: format of the files.
        save: function that writes a folder.
        card: function of the identity and the full id that returns the text of README.md.
        private: visibility of a new repository; None for the owner's default.

    Raises:
        ConnectionError: the hub cannot be reached or refused the files.
        ModelFolderError: the repository holds the `config.json` of something else.
        ModuleNotFoundError: huggingface_hub is not installed.
        PermissionError: the token may not write there.
    """
    hub = _imported()
    api = hub.HfApi(library_name=_LIBRARY)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        identity = save(folder)  # its errors come before a repository is created
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            there = set(api.list_repo_files(repo_id))
            if "config.json" in there:
                content = Path(api.hf_hub_download(repo_id, "config.json")).read_bytes()
                check_ours(content, f"config.json of the repository {repo_id}", written, other="another repository")
            (folder / "README.md").write_text(card(identity, repo_id), encoding="utf-8")
            added = {file.name: file for file in sorted(folder.iterdir())}
            old = sorted(name for name in there - set(added) if written.weights.fullmatch(name))
            # not upload_folder, which may split the files into several commits
            changes = [hub.CommitOperationAdd(name, file) for name, file in added.items()]
            changes += [hub.CommitOperationDelete(name) for name in old]
            message = f"{written.kind.capitalize()} version {identity.version}"
            return str(api.create_commit(repo_id, changes, commit_message=message).oid)
        except (hub.errors.HTTPError, hub.errors.OfflineModeIsEnabled, RuntimeError) as error:  # uploads raise the last
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                raise PermissionError(
                    f"{hub.constants.ENDPOINT} does not let you write to {repo_id}; log in with `hf auth login`, or "
                    f"set HF_TOKEN to a token that may: {error}"
                ) from error
            raise ConnectionError(
                f"{repo_id} could not be pushed to {hub.constants.ENDPOINT}, which has confirmed no commit; check the "
                f"network and HF_HUB_OFFLINE, and try again: {error}"
            ) from error


def _imported() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise ModuleNotFoundError(
            f"repositories of the Hugging Face hub need huggingface_hub: {_INSTALL}", name="huggingface_hub"
        ) from error
    return huggingface_hub
