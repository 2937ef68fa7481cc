"""Where mprd keeps its own files, and object storage by URL."""
