"""The way of an exported folder to the Hugging Face hub. Needs huggingface_hub (extra ``hf``)."""

from __future__ import annotations

from pathlib import Path

from w2v2.errors import JobError, UsageError


def expect_hub(repository: str) -> None:
    """Refuse, before any work, what cannot be pushed.

    Raises:
        UsageError: no token, or an impossible name.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise UsageError(f"--push-to-hub must be OWNER/NAME, got {repository!r}") from error
    if not huggingface_hub.get_token():
        raise UsageError("--push-to-hub needs a token of the hub: set HF_TOKEN, or run 'hf auth login'")


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub, to a private repository if there is none yet; its address.

    Raises:
        JobError: the hub says no, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of whichever client it is built on

    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of w2v2")
    except (OSError, HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"{folder} is written, but not pushed to {repository}: {reason}") from error
    return str(address)
