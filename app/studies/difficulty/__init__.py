"""Train and evaluate difficulty predictors: `dots difficulty`."""
