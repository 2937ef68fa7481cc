"""Data sets, image decoding and caching, augmentation, and drawn pedestrians."""
