"""The `paged-cache` command, also as `python -m paged_cache`."""

import sys


def main() -> None:
    """Run the command line, or say in one line what is missing for it."""
    try:
        from paged_cache.cli import app
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in {"typer", "rich"}:
            raise
        from paged_cache.optional import not_installed

        sys.exit(f"paged-cache: {not_installed(library)}")
    app()


if __name__ == "__main__":
    main()
