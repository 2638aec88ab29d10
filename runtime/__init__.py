"""The infrastructure around the method: data sets on disk, tokenizer, devices, processes, checkpoints, files, log."""
