"""`python -m app` is `dots`."""

from app.cli.dots import main

if __name__ == "__main__":
    main()
