# Table 2, "-Out Adapter".
base = "train_small.py"
output_adapter_layers = 0
