# Table 2, "-Adapters".
base = "train_small.py"
input_adapter_layers = 0
output_adapter_layers = 0
