"""Programs around the model: figures, benchmarks of speed, conversion of weights, starting many processes."""
