"""The transfer of weights from the trainer to vLLM servers: code that runs in both."""
