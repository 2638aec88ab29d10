# Table 2, "-Dyn. pooling".
base = "train_small.py"
layer_pooling = "fixed"  # fixed learned weights softmax(phi) instead of the layer selector
beta = 0.0
