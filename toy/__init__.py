"""The toy world: drawn scenes, a tiny Qwen3.5, its base training, and the table of methods."""
