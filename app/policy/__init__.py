"""The policy: any Hugging Face causal language model, loaded, scored, sharded and exported."""
