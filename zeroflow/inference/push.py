"""Upload of an exported model to the Hugging Face Hub."""

from pathlib import Path

from zeroflow.data import hub_errors
from zeroflow.data.hub_errors import HubError

_LOG_IN = "`hf auth login` with a token that may write, or HF_TOKEN"


def require_name(repository: str) -> None:
    """
    Raises:
        ValueError: `repository` is not the name of a repository with its owner.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {error}") from error
    if "/" not in repository:
        raise ValueError(f"--push {repository}: name the owner too, as in OWNER/{repository}")


def require_login() -> None:
    """
    Raises:
        HubError: there is no token of the Hub.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        cause = "an upload needs a login"
        raise HubError("the Hub", cause, transient=False, remedies=(_LOG_IN,))


def push(folder: Path, repository: str) -> str:
    """Upload the files of `folder` in one commit, and return the address of the repository.

    A repository that does not exist is created as a private one. Files with other names are kept.

    Raises:
        HubError: the hub refused or failed.
    """
    from huggingface_hub import HfApi, constants

    hub = HfApi(endpoint=constants.ENDPOINT)
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model from zeroflow"
        )
    except Exception as error:  # classes change between versions of the library
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            cause = f"the hub does not accept an upload with this login ({status})"
            raise HubError(repository, cause, transient=False, remedies=(_LOG_IN,)) from error
        raise hub_errors.explain(error, repository) from error
    return str(address)
