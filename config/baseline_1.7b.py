# Baseline-1.7B: SmolLM-1.7B with the speech units in its vocabulary, nothing else. Stage 2 alone, 16B tokens.
# The paper has it at 32B too, beside SmolTolk-2B: --stages.stage2.steps=30_518
base = "baseline_135m.py"
init_from = "weights/smollm-1.7b"
tokenizer = "weights/smollm-1.7b/tokenizer.json"
micro_batch = 4
