"""Compare selectors on a recorded run: `dots forecast`."""
