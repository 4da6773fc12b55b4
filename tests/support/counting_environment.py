"""An environment as TRL's `environment_factory` takes them, and a reward function that reads the final objects."""

import os
import random
import time


class Counting:
    """Adds the numbers that it is given, from a start that is drawn."""

    def reset(self, **row):
        self.total, self.added = random.randint(0, 9), []
        self.slow = row["question"].endswith(os.environ.get("DOTS_TEST_SLOW_ENVIRONMENT", "nothing ends so"))

    def add(self, number: str) -> str:
        """Add a number.

        Args:
            number: it, in digits.

        Returns:
            The sum so far.
        """
        if self.slow:
            time.sleep(60)
        self.added.append(number)
        self.total += int(number)
        return str(self.total % 100)


def even(environments, completions, **rest):
    """Return 1 for an even sum and at least one call, else 0."""
    return [float(bool(one.added) and one.total % 2 == 0) for one in environments]
