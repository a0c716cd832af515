"""The language model and what it reads and writes: settings, prompts, answer states, rollouts, adapters, loading."""
