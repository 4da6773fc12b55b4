"""`python -m app` is `dots`."""

from app.import_path import put_user_folder_last

put_user_folder_last()  # before anything is imported that a file in it could hide

from app.cli.entry import main  # noqa: E402

if __name__ == "__main__":
    main()
