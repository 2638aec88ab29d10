# Vocabulary expansion with as many parameters as SmolTolk has: its four adapter layers go to the backbone instead.
base = "baseline_tiny.py"
num_hidden_layers = 8
