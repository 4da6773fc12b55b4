"""How weights travel from the trainer to vLLM servers."""
