"""A finished export on a hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import OutputError


def require_hub(repository: str) -> None:
    """Refuse an upload that cannot succeed, before anything is made.

    Raises:
        OutputError: the name is none, the client is set to work offline, or there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    where = f"--push-to-hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OutputError(f"this is no name of a repository: {error}", where=where, remedy="OWNER/NAME.") from None
    if constants.HF_HUB_OFFLINE:
        raise OutputError("the hub's client is set to work offline", where=where, remedy="Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise OutputError(
            "there is no token for the hub",
            where=where,
            remedy="hf auth login, or set HF_TOKEN, one that may write.",
        )


def push(folder: Path, repository: str, *, public: bool) -> str:
    """Upload all files of an export in one commit; returns its address.

    Args:
        folder: the export, which stays.
        repository: OWNER/NAME; made if it is not there.
        public: whether everybody sees a repository that is made now.

    Raises:
        OutputError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Export of trivet: {folder.name}"
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise _refused(error, folder, repository) from error
    except Exception as error:  # the client's HTTP library has errors of its own, and changes with its versions
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise _refused(error, folder, repository) from error
    return str(commit.commit_url)


def _refused(error: Exception, folder: Path, repository: str) -> OutputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OutputError(
        f"the hub did not take it: {reason}",
        where=f"--push-to-hub {repository}",
        remedy=f"The export is whole in {folder}; the same command only uploads it.",
    )
