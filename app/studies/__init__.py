"""Studies of runs and of recorded runs: comparisons, forecasts, difficulty predictors."""
