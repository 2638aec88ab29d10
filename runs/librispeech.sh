#!/bin/bash
# A first real run on one GPU, in a day: SmolLM-135M learns to hear and speak from 460 hours of LibriSpeech.
#
#   bash runs/librispeech.sh                 all steps
#   bash runs/librispeech.sh librispeech     only this one
#
# It needs 70 GB of disk for the archives and what is in them, and 0.4 GB for the data sets. NOT RUN with the real files, see train_150m.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-1} RAW=${RAW:-raw} OPTIONS=${OPTIONS:-}
TEXT="--tokenizer=weights/smollm-135m/tokenizer.json $OPTIONS"
PAIRED="$TEXT --units=units/mhubert --aligner=aligners/mms --lower=true"
MAKE="torchrun --nproc_per_node=$GPUS -m"

common() {  # packages, the text model, units and aligner
    MODEL=smollm-135m bash runs/train_150m.sh packages weights units aligner
}
text() {  # 100 million tokens of FineWeb-Edu, so that the model does not forget how to write; ODC-By
    hf download HuggingFaceTB/smollm-corpus --repo-type dataset --local-dir "$RAW/fineweb-100m" \
        --include 'fineweb-edu-dedup/train-00000-*'
    python -m corpora.text --source="$RAW/fineweb-100m/fineweb-edu-dedup" --out=data/fineweb-100m --max_tokens=1e8 \
        --val_share=0.001 $TEXT
    python -m corpora.text --source="$RAW/fineweb-100m/fineweb-edu-dedup" --out=data/fineweb-100m-val --max_tokens=1e6 \
        --val_share=0.001 --split=val $TEXT
}
librispeech() {  # CC BY 4.0. The transcripts are in capitals, which a text model hardly knows, so they are lowered
    for part in dev-clean train-clean-100 train-clean-360; do
        [ -e "$RAW/$part.unpacked" ] && continue
        curl -fL --retry 9 -C - -o "$RAW/$part.tar" https://www.openslr.org/resources/12/$part.tar.gz
        tar xf "$RAW/$part.tar" -C "$RAW"
        rm "$RAW/$part.tar" && touch "$RAW/$part.unpacked"
    done
    $MAKE corpora.librispeech --source="$RAW/LibriSpeech/dev-clean" --out=data/librispeech-words-dev $PAIRED
    for part in train-clean-100 train-clean-360; do
        $MAKE corpora.librispeech --source="$RAW/LibriSpeech/$part" --out=data/librispeech-words/$part $PAIRED
    done
}
check() {
    python train.py config/train_librispeech.py --check
}
train() {
    torchrun --nproc_per_node="$GPUS" train.py config/train_librispeech.py
}

mkdir -p "$RAW" data
for step in ${@:-common text librispeech check train}; do
    echo "== $step"
    "$step"
done
