"""What a model does on text: densities, similarities, norms, attention; statistics and figures."""
