# Table 2, "-Out Adapter".
base = "train_400m.py"
output_adapter_layers = 0
