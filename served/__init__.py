"""Models behind a server: the client, and pictures as they travel."""
