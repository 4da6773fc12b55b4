"""The optimizer steps of a batch: loss, gradients, updates, and their metrics."""
