"""Quality through the path that is timed: perplexity, tasks, comparison of settings."""
