"""One folder per technology; adapters never import each other."""
