"""Bundles to and from the Hugging Face hub."""

from pathlib import Path

from ejax import assets, storage
from ejax.bundle import EXITS, Bundle
from ejax.bundle_files import OWNED
from ejax.card import CARD_FOLDER
from ejax.errors import UserError
from ejax.saving import save_bundle


def bundle_at(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a bundle; a string "user/name" that is none here is fetched from the hub.

    Args:
      revision: on the hub, a branch, a tag or a commit; None is main.

    Raises:
      ValueError: where it cannot be fetched, a folder here is given a revision, or the storage is
        not known.
    """
    if _is_elsewhere(name):
        return assets.hub_folder(str(name), OWNED, revision=revision, what="bundle")
    if revision is not None:
        raise UserError(
            f"revision is for a bundle on the hub, such as 'user/name', that is no folder here. "
            f"Got {revision!r} for {str(name)!r}."
        )
    return storage.path_of(name)


def is_bundle(name: str) -> bool:
    """Whether a folder, here or on gs://, or a hub id is that of a bundle, and not of a model.

    Raises:
      ValueError: where it cannot be fetched.
    """
    if _is_elsewhere(name):
        return (assets.hub_folder(name, (EXITS,), what="bundle or model") / EXITS).exists()
    return storage.is_remote(name) or (Path(name) / EXITS).exists()


def _is_elsewhere(name: str | Path) -> bool:
    hub_id = isinstance(name, str) and assets.is_hub_id(name)
    return hub_id and not (assets.held(Path(name)) or storage.set_aside(Path(name)))


def push_bundle(
    bundle: Bundle,
    repo_id: str,
    *,
    private: bool | None,
    rows: bool,
    token: str | None,
    commit_message: str,
) -> str:
    """`EarlyExitClassifier.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with storage.temporary_folder() as above:
        folder = save_bundle(bundle, above / "bundle", rows=rows)
        card = folder / "README.md"
        card.write_text(card.read_text("utf-8").replace(CARD_FOLDER, repo_id), "utf-8")
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(url.repo_id).private:
                raise UserError(
                    f"{url} is there and is public, and private=True was asked: make it private "
                    f"in its settings, or give another name. Nothing was uploaded."
                )
            api.upload_folder(
                repo_id=url.repo_id, folder_path=folder, commit_message=commit_message,
                delete_patterns=list(OWNED),  # of an earlier one, where this has none
            )  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # the hub's HTTP library, and so its errors, change by version
            raise UserError(
                f"the hub did not take {repo_id!r}: check the name, the network, and that you may "
                f"write there (`hf auth login`, or token=). {assets.first_line(error)}"
            ) from error
    return str(url)
