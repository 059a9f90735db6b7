"""dejavu: contextual sparsity for fast decoding of language models."""
