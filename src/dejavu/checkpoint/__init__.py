"""Checkpoints: where they come from, and how their weights are laid out."""
