"""What lies on disk and how it gets there: files written whole, JSON lines, downloads, pictures."""
