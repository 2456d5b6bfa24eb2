"""The hub and its cache: is a file there already, and if not, fetch it or say in one line why that cannot be.

`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and their kin are read by huggingface_hub itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the HTTP library underneath, whichever that is: what a lost connection raises
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from flux_ir.errors import FluxIRError

Announce = Callable[[str], None]
_OTHER_WAYS = "or name local copies with --checkpoint and --ae_checkpoint; --model flux-tiny needs none"


def cached(repo_id: str, filename: str) -> Path | None:
    """Where the hub's cache holds this file of the repository's main revision, or None."""
    found = try_to_load_from_cache(repo_id, filename)
    return Path(found) if isinstance(found, str) else None  # a third answer is "known not to exist"


def download(repo_id: str, filename: str, announce: Announce | None) -> Path:
    """Fetches one file into the hub's cache. Raises FluxIRError if there is no network, no access or no such file."""
    if announce is not None:
        announce(f"downloading {filename} from {repo_id}")
    with _plain_errors(repo_id, filename):
        # Asked once first: hf_hub_download would try for half a minute before it gave up, warning at each turn.
        get_hf_file_metadata(hf_hub_url(repo_id, filename))
        return Path(hf_hub_download(repo_id, filename))


def download_folders(repo_id: str, folders: tuple[str, ...], announce: Announce | None) -> Path:
    """Fetches whole folders, those of text encoders, into the hub's cache: the local folder they stand in."""
    wanted = " and ".join(f"{folder}/" for folder in folders)
    if announce is not None:
        announce(f"downloading {wanted} from {repo_id}")
    with _plain_errors(repo_id, wanted, "or name local copies with FLUX_T5 and FLUX_CLIP"):
        # Asked first: where the hub is out of reach, snapshot_download gives what the cache has, whole or not.
        get_hf_file_metadata(hf_hub_url(repo_id, f"{folders[0]}/config.json"))
        return Path(snapshot_download(repo_id, allow_patterns=[f"{folder}/*" for folder in folders]))


def download_repository(repo_id: str, patterns: tuple[str, ...], announce: Announce | None) -> Path:
    """Fetches the files of a repository whose names match into the hub's cache: the local folder they stand in."""
    if announce is not None:
        announce(f"downloading {', '.join(patterns)} from {repo_id}")
    with _plain_errors(repo_id, " and ".join(patterns), "or name a local folder"):
        folder = Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
        if not any(file for pattern in patterns for file in folder.glob(pattern)):
            HfApi().model_info(repo_id)  # if the hub is out of reach, this says so
            raise FluxIRError(f"{repo_id} has no {' and no '.join(patterns)}", hint="check the repository's name")
        return folder


def upload_folder(folder: Path, repo_id: str, names: tuple[str, ...], *, private: bool) -> str:
    """Puts these files of a folder into a repository as one commit; makes the repository if there is none.

    Returns the address of the commit. Raises FluxIRError if there is no network, or no right to write there.
    """
    with _plain_errors(repo_id, "what was to be written", "or copy the folder by hand"):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(names))
    return str(commit.commit_url)


@contextmanager
def _plain_errors(repo_id: str, wanted: str, other_ways: str = _OTHER_WAYS) -> Iterator[None]:
    """Turns what may go wrong on the way to the hub into one line each. The order matters: later classes are wider."""
    try:
        yield
    except GatedRepoError as error:
        raise FluxIRError(
            f"{repo_id} is gated: the hub gives {wanted} only to accounts that have accepted its licence",
            hint="accept the licence on the model's page on the hub, then set HF_TOKEN to a token of that account",
        ) from error
    except RepositoryNotFoundError as error:
        raise FluxIRError(
            f"the hub does not show the repository {repo_id} to this account", hint="check HF_TOKEN and HF_ENDPOINT"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(repo_id, wanted, error.__cause__, other_ways) from error
    except EntryNotFoundError as error:
        raise FluxIRError(f"{repo_id} has no {wanted}", hint="check HF_ENDPOINT") from error
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise _unreachable(repo_id, wanted, error, other_ways) from error
    except OSError as error:  # a full disk, above all
        raise FluxIRError(
            f"fetching {wanted} from {repo_id} stopped: {error}",
            hint=f"try again (it goes on where it stopped), {other_ways}",
        ) from error


def _unreachable(repo_id: str, wanted: str, cause: BaseException | None, other_ways: str) -> FluxIRError:
    if isinstance(cause, OfflineModeIsEnabled):
        return FluxIRError(
            f"{wanted} of {repo_id} is not in the hub's cache and HF_HUB_OFFLINE forbids fetching it",
            hint=f"unset HF_HUB_OFFLINE, {other_ways}",
        )
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        return FluxIRError(
            f"the hub refused {wanted} of {repo_id} with status {cause.response.status_code}",
            hint=f"check HF_TOKEN, try again later, {other_ways}",
        )
    return FluxIRError(
        f"{wanted} of {repo_id} is not in the hub's cache and the hub cannot be reached",
        hint=f"check the network, {other_ways}",
    )
