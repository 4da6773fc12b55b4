"""Tables, curves and pictures of a run, and the figures behind them."""
