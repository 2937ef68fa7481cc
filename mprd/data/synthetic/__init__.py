"""A synthetic data set of drawn pedestrians, for tests and demonstrations."""
