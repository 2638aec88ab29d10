# Table 2, "-Residual".
base = "train_small.py"
residual = False
