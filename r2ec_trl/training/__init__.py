"""RecPO and its warm start as trainers."""
