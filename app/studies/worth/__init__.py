"""`dots worth`: what a replayed group adds to an update, as a share of what a fresh one adds."""
