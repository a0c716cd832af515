"""Raw sources: one file a kind, and the readers they share."""
