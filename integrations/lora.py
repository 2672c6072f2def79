"""Adapters on disk, as peft saves them, for a batcher that loads each when it is asked for."""

from pathlib import Path

from paged_cache import InvalidRequestError

CONFIG = "adapter_config.json"


def adapter_folders(path: str | Path) -> dict[str, Path]:
    """Finds the adapters in a folder: `ContinuousBatcher(..., lora_modules=adapter_folders("adapters/"), max_loras=4)`.

    An adapter is a folder that holds an `adapter_config.json`: `path` itself, and what lies directly in it. So are the folder
    of peft's `save_pretrained`, with one folder per adapter, and the checkpoints of a training run.

    Returns:
        Folders by their own names, in the order of the names.

    Raises:
        InvalidRequestError: There is no such folder, no adapter in it, or one has the name of `path`, which is one, too.
    """
    root = Path(path).resolve()
    if not root.is_dir():
        raise InvalidRequestError(f"{str(path)!r} is no folder: adapters are folders that hold an {CONFIG}.")
    inside = {folder.name: folder for folder in sorted(root.iterdir()) if (folder / CONFIG).is_file()}
    itself = {root.name: root} if (root / CONFIG).is_file() else {}
    if not (inside or itself):
        raise InvalidRequestError(
            f"no {CONFIG} in {str(path)!r} or in a folder of it: save adapters there with `model.save_pretrained(...)`."
        )
    if clash := inside.keys() & itself.keys():
        name = clash.pop()
        raise InvalidRequestError(
            f"two adapters are called {name!r}: {root} and {inside[name]}. Rename one, or name them yourself, "
            "lora_modules={name: folder}."
        )
    return dict(sorted((itself | inside).items()))
