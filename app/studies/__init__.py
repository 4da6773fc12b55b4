"""Studies of runs and of recorded traces, and the pictures they make."""
