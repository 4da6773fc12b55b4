"""Environments of `verifiers` (https://github.com/PrimeIntellect-ai/verifiers), version 0.4."""
