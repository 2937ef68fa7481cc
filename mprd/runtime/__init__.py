"""Device, random streams, checkpoints, and the processes that train one model together."""
