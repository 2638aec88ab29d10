# Table 2, "-Adapters".
base = "train_400m.py"
input_adapter_layers = 0
output_adapter_layers = 0
