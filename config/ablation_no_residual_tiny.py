# Table 2, "-Residual".
base = "train_tiny.py"
residual = False
