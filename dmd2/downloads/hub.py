"""Repositories of the Hugging Face hub in its local cache."""

from __future__ import annotations

from pathlib import Path

from dmd2.config import ModelFolder
from dmd2.errors import UserError


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder has the form OWNER/NAME."""
    return not Path(path).is_absolute() and path.count("/") == 1 and not path.startswith(".")


def resolve(model: ModelFolder) -> Path:
    """The folder of a model: the configured one, or the local copy of a repository of the hub at its revision.

    Never uses the network. Raises UserError with the command that fetches a repository that is not there.
    """
    folder = Path(model.path)
    if folder.is_dir():
        return folder
    if not is_hub_id(model.path):
        raise UserError(f"teacher.weights.path: {model.path}: no such folder; put the model there or correct the path")
    if model.revision is None:
        raise UserError(
            f"teacher.weights.revision: {model.path} is no folder, and a repository of the hub needs a revision "
            f"(a commit); set it, or put the model into a folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        raise UserError(
            f"teacher.weights: {model.path} is neither a folder nor in the hub's local cache at revision "
            f"{model.revision}; run `hf download {model.path} --revision {model.revision}` where there is a network"
        ) from None
