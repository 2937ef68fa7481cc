"""F: images to unit features (Sec. 3.1, 5.2)."""
