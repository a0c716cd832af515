"""vLLM as the writer of rollouts: what it cannot be, the engine, the weights it gets."""
