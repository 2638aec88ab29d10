# SmolTolk-400M, on SmolLM-360M, 16 billion tokens. The paper's Table 2 removes one part of it at a time.
# Each row of that table is this config with a flag, and --out_dir for the run's folder:
#   - In Adapter      --input_adapter_layers=0
#   - Out Adapter     --output_adapter_layers=0
#   - Adapters        --input_adapter_layers=0 --output_adapter_layers=0
#   - Layer pooling   --layer_pooling=last --beta=0       the last layer only
#   - Dyn. pooling    --layer_pooling=fixed --beta=0      fixed learned weights instead of the layer selector
#   - Residual        --residual=false
base = "train_150m.py"
init_from = "weights/smollm-360m"
tokenizer = "weights/smollm-360m/tokenizer.json"
beta = 0.01  # The layer selector of a larger model may collapse without it.
micro_batch = 8
