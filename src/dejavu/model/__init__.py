"""One decoder, built from a config: the mathematics of its blocks, its steps, its cache."""
