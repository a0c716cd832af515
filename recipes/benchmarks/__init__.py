"""One module a case, with `run(words) -> dict`: recipes/benchmark.py finds them by name."""
