"""The triplet format: full image with a red box, crop of what it frames, and a question."""
