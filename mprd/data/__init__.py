"""Images: where they are, how they are read, and drawn ones."""
