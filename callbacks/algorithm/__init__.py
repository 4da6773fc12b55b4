"""Callbacks that are the algorithm: what is rolled out, replayed and trained on."""
