"""Where it meets the world: executors, training files and the command line, one file an outside system."""
