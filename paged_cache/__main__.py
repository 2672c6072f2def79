"""The `paged-cache` command, also as `python -m paged_cache`."""

import sys


def main() -> None:
    """Run the command line, or say in one line what is missing for it."""
    try:
        from paged_cache.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich", "tqdm"}:
            raise
        sys.exit(f"paged-cache: {error.name} is not installed; run: pip install 'paged-cache[cli]'")
    app()


if __name__ == "__main__":
    main()
