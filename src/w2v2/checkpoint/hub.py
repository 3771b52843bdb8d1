"""Models that are not here: by name on the Hugging Face hub, by address. And the way of an exported folder to the hub.

The hub's part is huggingface_hub's (extra ``hf``): its cache, token, offline mode (``HF_HUB_OFFLINE``), endpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from w2v2.data.storage import is_remote, read_range, size_of
from w2v2.errors import JobError, UsageError, first_line, public
from w2v2.files import whole

_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*?)(?:@([\w./-]+))?")
_FILE_ENDINGS = (".pt", ".onnx", ".bin", ".safetensors")
_SETTINGS = (
    "config.json", "preprocessor_config.json", "processor_config.json", "vocab.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "adapter.{}.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin", "adapter.{}.bin"),
    ("model.onnx", "model.onnx.data"),
)
"""Of a model in each form, the best one first; ``{}`` stands for a language."""
_BLOCK = 8 * 2**20
"""Bytes of a file that are asked for at once."""


def locate(name: str | os.PathLike[str], language: str | None = None) -> Path:
    """Where a model lies, which is downloaded first if it is not here.

    Args:
        name: a folder or file; a name of the hub, ``OWNER/MODEL`` or ``OWNER/MODEL@REVISION``, if there is no such
            folder; an address of a file, such as fairseq's. A ``Path`` is always the first of these.
        language: whose adapter is wanted too.

    Returns:
        A path that may not exist, if the name can only be one.

    Raises:
        UsageError: it cannot be downloaded.
    """
    if not isinstance(name, str) or os.path.exists(name):
        return Path(name)
    if is_remote(name):
        return _download(name)
    match = _HUB_NAME.fullmatch(name)
    if match is None or name.endswith(_FILE_ENDINGS):
        return Path(name)
    if language is not None and not re.fullmatch(r"[\w-]+", language):
        raise UsageError(f"`language` must be a code such as deu, got {language!r}")
    return _snapshot(match[1], match[2], language)


def _snapshot(name: str, revision: str | None, language: str | None) -> Path:
    """The hub's folder of a model, with the files that a model consists of."""
    folder = None
    for weights in _WEIGHTS:
        patterns = [pattern.format(language) for pattern in weights if language or "{}" not in pattern]
        folder = _fetch(name, revision if folder is None else folder.name, [*_SETTINGS, *patterns])
        if any((folder / file).is_file() for file in weights[:2]):
            return folder
    assert folder is not None
    forms = ", ".join(weights[0] for weights in _WEIGHTS)
    raise UsageError(f"{name} has no weights{_at(revision)}: expected one of {forms}; choose another revision")


def _at(revision: str | None) -> str:
    return f" at revision {revision}" if revision else ""


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as error:
        raise UsageError(
            f"no {name} here: expected a folder or file; if it is a model of the hub: pip install huggingface_hub"
        ) from error
    where = f"{constants.ENDPOINT}/{name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise UsageError(f"{name} is gated: ask for access at {where}, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"there is no {name}, neither here nor on the hub ({where}); check the name, or, for a private model, "
            "set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision}; {where}/commits/main lists them") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UsageError(f"there is no {name}{_at(revision)} here or in the hub's cache, and {reason}") from error
    except (OSError, errors.HTTPError, ValueError) as error:
        raise UsageError(f"cannot get {name} from the hub: {first_line(error)}") from error


def _download(address: str) -> Path:
    """A file of the web, with the dictionary that fairseq has beside its files, kept in torch's cache."""
    import torch

    name = os.path.basename(urlsplit(address).path)
    if not name.endswith(".pt"):
        raise UsageError(f"{public(address)} is no .pt file; expected a checkpoint of fairseq, or a name of the hub")
    folder = Path(torch.hub.get_dir()) / "w2v2" / hashlib.sha256(address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        with contextlib.suppress(OSError):  # most have theirs inside
            _copy(f"{address.rpartition('/')[0]}/dict.ltr.txt", folder / "dict.ltr.txt")
        try:
            _copy(address, folder / name)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot download {public(address)}: {public(str(reason))}") from error
    return folder / name


def _copy(address: str, to: Path) -> None:
    size = size_of(address)
    with whole(to) as partial, partial.open("wb") as file:
        for start in range(0, size, _BLOCK):
            file.write(read_range(address, start, min(_BLOCK, size - start)))


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
        raise JobError(f"{folder} is written, but not pushed to {repository}: {first_line(error)}") from error
    return str(address)
