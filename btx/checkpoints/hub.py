"""Hub repositories named in a recipe, fetched by huggingface_hub into its cache, at the commit of their revision.

`hf://org/name@revision` is a model, `hf://datasets/org/name@revision/path` a file, folder or glob of a dataset; without
a revision it is the main branch. Only files that btx reads are fetched. Offline, or where the hub does not answer, what
the cache has of the revision is used. Tokens are huggingface_hub's own affair: it takes them from the environment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from btx.checkpoints.carried import CARRIED, TEMPLATES
from btx.checkpoints.layouts import ADAPTER, ADAPTER_WEIGHTS, CONFIG, INDEX, SINGLE
from btx.errors import ArtifactError, BtxError, RecipeError

SCHEME = "hf://"
_DATASETS = "datasets/"
FILES = [CONFIG, INDEX, SINGLE, "model-*-of-*.safetensors", *CARRIED, f"{TEMPLATES}/*.jinja", ADAPTER, ADAPTER_WEIGHTS]
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"(?P<id>{_NAME}/{_NAME})(@(?P<revision>[^@/]+))?(/(?P<path>.+))?")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, and what is meant in it."""

    id: str  # org/name
    revision: str | None  # a branch, tag or commit; None is the main branch
    path: str | None = None  # in a dataset

    @property
    def kind(self) -> str:
        """The hub's word for its kind."""
        return "dataset" if self.path is not None else "model"


def is_hub(name: str) -> bool:
    """Whether a checkpoint or a data source names a hub repository."""
    return name.startswith(SCHEME)


def short_name(name: str) -> str:
    """What a checkpoint is called where its place does not matter: org/name, or the folder's name."""
    return parsed(name, "seed.checkpoint").id if is_hub(name) else Path(name).name


def parsed(name: str, where: str) -> Repository:
    """What `hf://...` names; RecipeError for what is no repository's name. A revision's slashes are written %2F."""
    rest = name.removeprefix(SCHEME)
    data = rest.startswith(_DATASETS)
    found = _REPOSITORY.fullmatch(rest.removeprefix(_DATASETS))
    if not found or bool(found["path"]) != data:
        form = "hf://datasets/org/name@revision/path" if data else "hf://org/name@revision"
        raise RecipeError(f"{where}: {name!r:.200} names no repository of the hub. Write {form}, or a local path.")
    revision = found["revision"].replace("%2F", "/") if found["revision"] else None
    return Repository(found["id"], revision, found["path"])


def checkpoint(name: str, where: str) -> tuple[Path, str]:
    """The local snapshot of a model, fetched if it must be, and its name with the commit instead of the revision."""
    folder = _fetched(parsed(name, where), tuple(FILES), where)
    return folder, f"{name.split('@')[0]}@{folder.name}"


def described(name: str, base: Path, where: str) -> Path:
    """A folder with the config and tokenizer of a checkpoint: a local one, or a snapshot without its weights."""
    if not is_hub(name):
        return base / Path(name).expanduser()
    return _fetched(parsed(name, where), tuple(file for file in FILES if not file.endswith(".safetensors")), where)


def dataset(name: str, where: str) -> Path:
    """The local path of what `hf://datasets/...` names, which may be a glob, its files fetched if they must be."""
    named = parsed(name, where)
    assert named.path is not None
    return _fetched(named, (named.path, f"{named.path.rstrip('/')}/*"), where) / named.path


@cache
def _fetched(repository: Repository, files: tuple[str, ...], where: str) -> Path:
    """The snapshot folder of a repository, with the files of these patterns."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repository.id, repo_type=repository.kind, revision=repository.revision, allow_patterns=list(files)
        )
    except Exception as error:  # of huggingface_hub, of its HTTP library, of the system
        raise _told(error, repository, where) from error
    return Path(found)


def _told(error: Exception, repository: Repository, where: str) -> BtxError:
    """What an error of huggingface_hub means to the person who wrote the recipe."""
    from huggingface_hub import errors

    name = f"{where}: {'the dataset ' if repository.path is not None else ''}{repository.id}"
    at = repository.revision or "main"
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError, so it comes first
        return ArtifactError(
            f"{name} is gated: its authors give access on request. Ask for it on its page, and set HF_TOKEN to a token "
            "of the account that was given it."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ArtifactError(f"{name} has no revision {at!r}. Name a branch, a tag or a commit that it has.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ArtifactError(
            f"{name} is not on the hub, or is private. Correct its name, or set HF_TOKEN to a token that may read it."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return ArtifactError(
            f"{name} cannot be fetched: the hub does not answer or is switched off (HF_HUB_OFFLINE), and the cache has "
            f"not all that is needed of revision {at!r}. Go online once, or name a local folder."
        )
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    code = getattr(getattr(error, "response", None), "status_code", None)
    why = f"status {code}" if code else "it broke off"
    return ArtifactError(
        f"{name} was not fetched whole ({type(error).__name__}, {why}). Run the command again: what is there is not "
        "fetched again."
    )


def push(folder: Path, name: str, *, private: bool, revision: str | None) -> str:
    """Upload an export as a repository of the hub, made if it is not there; returns the commit's address.

    ArtifactError for what the hub refuses.
    """
    from huggingface_hub import HfApi

    where = "btx push"
    repository = parsed(name if is_hub(name) else SCHEME + name, where)
    if repository.path is not None or repository.revision is not None:
        raise RecipeError(f"{where}: {name!r:.200} is no org/name. A branch is named by --revision.")
    try:
        api = HfApi()
        api.create_repo(repository.id, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repository.id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository.id, folder_path=folder, revision=revision, commit_message="Upload an export of btx"
        )
    except Exception as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code in (401, 403):
            raise ArtifactError(
                f"{where}: the hub does not let you write {repository.id} (status {code}). Set HF_TOKEN to a token "
                "that may write it."
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = f", status {code}" if code else ""  # no text of the library's, in which a header might stand
        raise ArtifactError(
            f"{where}: {repository.id} was not uploaded whole ({type(error).__name__}{why}). Run the command again."
        ) from error
    return str(done.commit_url)
