# Table 2, "-Out Adapter".
base = "train_tiny.py"
output_adapter_layers = 0
