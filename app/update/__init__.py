"""The optimizer steps of a batch: mini-batches, micro-batches, loss, gradients, statistics."""
