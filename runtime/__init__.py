"""What a reader of the method does not need: processes, checkpoints, files and the log."""
