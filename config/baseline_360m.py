# Baseline-360M: vocabulary expansion of SmolLM-360M, 16 billion tokens.
base = "baseline_135m.py"
init_from = "weights/smollm-360m"
tokenizer = "weights/smollm-360m/tokenizer.json"
micro_batch = 8
