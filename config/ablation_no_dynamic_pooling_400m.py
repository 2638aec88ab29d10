# Table 2, "-Dyn. pooling".
base = "train_400m.py"
layer_pooling = "fixed"  # fixed learned weights softmax(phi) instead of the layer selector
beta = 0.0
