"""
The paper's claim on the tiny run: SmolTolk and vocabulary expansion on the same data, and each row of Table 2.

    python -m studies.tiny                  says what is missing and how long it takes
    python -m studies.tiny run              makes all runs that are missing, then the tables
    python -m studies.tiny run --runs='["smoltolk","baseline"]' --seeds='[1]'         makes two of them
    python -m studies.tiny tables           tables and a figure of the finished runs
    python -m studies.tiny pictures         the figures of analyze.py for the first seed

A run that was cut off continues from its checkpoint. Runs are in out/study_tiny. The scores of finished ones and the
tables are in studies/results/tiny, a part of this repository. With --out=FOLDER all runs are made anew.
"""
import sys

from studies.study import Run, Study, main

STUDY = Study(
    name="tiny",
    help=__doc__,
    time="Each run takes one to five minutes of one core, so the 33 runs of three seeds take about two hours.",
    runs=dict(
        smoltolk=Run("SmolTolk", "config/train_tiny.py"),
        baseline=Run("vocabulary expansion, no stage 1", "config/baseline_tiny.py"),
        equal_steps=Run("vocabulary expansion, as many steps", "config/baseline_tiny.py --stages.stage2.steps=940"),
        equal_flops=Run("vocabulary expansion, as much compute", "config/baseline_tiny.py --stages.stage2.steps=1684"),
        # The backbone has four more layers in place of SmolTolk's four adapter layers.
        equal_parameters=Run("vocabulary expansion, as many steps and parameters",
                             "config/baseline_tiny.py --num_hidden_layers=7 --stages.stage2.steps=940"),
        no_input_adapter=Run("SmolTolk without input adapter", "config/train_tiny.py --input_adapter_layers=0"),
        no_output_adapter=Run("SmolTolk without output adapter", "config/train_tiny.py --output_adapter_layers=0"),
        no_adapters=Run("SmolTolk without adapters",
                        "config/train_tiny.py --input_adapter_layers=0 --output_adapter_layers=0"),
        no_layer_pooling=Run("SmolTolk without layer pooling", "config/train_tiny.py --layer_pooling=last --beta=0"),
        no_dynamic_pooling=Run("SmolTolk without dynamic pooling",
                               "config/train_tiny.py --layer_pooling=fixed --beta=0"),
        no_residual=Run("SmolTolk without residual", "config/train_tiny.py --residual=false")),
    evaluate=dict(tasks=["topic_cloze"]),
    pictures=["segmentation --checkpoint={smoltolk} --units=data/demo/units",
              "weights --checkpoint={smoltolk}",
              "dimension --checkpoint={smoltolk},{baseline} --points=1000",
              "overlap --checkpoint={smoltolk},{baseline} --points=1000",
              "scaling --checkpoint={smoltolk},{equal_flops}"])

if __name__ == "__main__":
    main(STUDY, sys.argv[1:])
