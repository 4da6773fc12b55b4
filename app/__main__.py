"""`python -m app` is `dots`."""

from app.cli import main

if __name__ == "__main__":
    main()
