"""
The paper in small, for one GPU: SmolLM2-135M becomes SmolTolk-150M, and a vocabulary-expansion baseline beside it.

    python -m studies.small                 says what is missing and how long it takes
    python -m studies.small run             makes all runs that are missing, then the tables
    python -m studies.small run --runs='["smoltolk","baseline"]' --seeds='[1]'         makes two of them
    python -m studies.small tables          tables and a figure of the finished runs
    python -m studies.small pictures        Table 3 and Figures 2 to 5, for the first seed

studies/small/README.md has the whole recipe, beginning with the data. The runs have not been made, because we had a
GPU for only fifteen minutes. A run that was cut off continues from its checkpoint. Runs and pictures are in
out/study_small. The scores of finished runs and the tables are in studies/results/small.
"""
import sys

from studies.study import Run, Study, main

TRAIN, BASELINE = "studies/small/config/train_small.py", "studies/small/config/baseline_small.py"
CLOZE = "data/small/cloze"
TEXT_BENCHMARKS = dict(blimp="data/blimp", mmlu="data/mmlu.csv")


def runs_at_rate(rate):
    """SmolTolk and the baseline on 20 million tokens, with a learning rate for stage 2."""
    title = f"stage 2 at learning rate {rate}, 20M tokens"
    ours = f"{TRAIN} --stages.stage2.learning_rate={rate} --stages.stage1.steps=30 --stages.stage2.steps=123"
    theirs = f"{BASELINE} --stages.stage2.learning_rate={rate} --stages.stage2.steps=153"
    return {f"smoltolk_rate_{rate}": Run(f"smoltolk, {title}", ours, leader=""),
            f"baseline_rate_{rate}": Run(f"baseline, {title}", theirs, leader=f"smoltolk_rate_{rate}")}


STUDY = Study(
    name="small",
    help=__doc__,
    time="A run of 100M tokens is 8.3e16 FLOPs: about three and a half minutes of an H100 at 40% of its peak, by "
         "arithmetic. 300M tokens are three times as much. No run has been made yet.",
    runs=dict(
        smoltolk=Run("SmolTolk, 100M tokens", TRAIN),
        baseline=Run("vocabulary expansion, no stage 1", BASELINE),
        smoltolk_300m=Run("SmolTolk, 300M tokens", f"{TRAIN} --stages.stage2.steps=2139", leader=""),
        baseline_300m=Run("vocabulary expansion, 300M tokens", f"{BASELINE} --stages.stage2.steps=2289",
                          leader="smoltolk_300m"),
        equal_flops=Run("vocabulary expansion, as much compute as SmolTolk",
                        f"{BASELINE} --stages.stage2.steps=792"),
        no_input_adapter=Run("SmolTolk without input adapter", f"{TRAIN} --input_adapter_layers=0"),
        no_output_adapter=Run("SmolTolk without output adapter", f"{TRAIN} --output_adapter_layers=0"),
        no_adapters=Run("SmolTolk without adapters", f"{TRAIN} --input_adapter_layers=0 --output_adapter_layers=0"),
        no_layer_pooling=Run("SmolTolk without layer pooling", f"{TRAIN} --layer_pooling=last --beta=0"),
        no_dynamic_pooling=Run("SmolTolk without dynamic pooling", f"{TRAIN} --layer_pooling=fixed --beta=0"),
        no_residual=Run("SmolTolk without residual", f"{TRAIN} --residual=false"),
        **runs_at_rate("1e-4"),
        **runs_at_rate("3e-4"),
        **runs_at_rate("1e-3")),
    evaluate=dict(tasks=["topic_cloze", "sblimp", "blimp", "mmlu"], cloze=CLOZE, units="data/small/units",
                  sblimp="data/spoken_blimp", **TEXT_BENCHMARKS),
    before=dict(checkpoint="weights/smollm2-135m", tasks=["topic_cloze", "blimp", "mmlu"], cloze=CLOZE,
                **TEXT_BENCHMARKS),
    pictures=[
        "segmentation --checkpoint={smoltolk} --data=data/small/test --val=data/small/val --utterances=500 "
        "--units=data/small/units",
        "weights --checkpoint={smoltolk} --data=data/small/test --utterances=500",
        "dimension --data=data/small/test --checkpoint={smoltolk},{baseline},{no_adapters},{no_layer_pooling}",
        "overlap --data=data/small/test --checkpoint={smoltolk},{baseline},{no_adapters},{no_layer_pooling}",
        "scaling --checkpoint={smoltolk_300m},{baseline_300m}"])

if __name__ == "__main__":
    main(STUDY, sys.argv[1:])
