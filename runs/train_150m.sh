#!/bin/bash
# From an empty disk to SmolTolk-150M: every step in its order. docs/train_for_real.md has sizes, hours and licences.
#
#   bash runs/train_150m.sh                          all steps, on one machine
#   bash runs/train_150m.sh weights units            only these
#   MACHINE=0/4 bash runs/train_150m.sh librilight   the first of four machines does its share of a step
#   MODEL=smollm-360m bash runs/train_150m.sh weights check train    the 400M model, with the same data
#
# When a step is done, data/.NAME.done says so, and the step is skipped. One that was interrupted continues when the same
# command is given again. Downloads go to raw/, and each may be deleted when its step is done. NOT RUN with the real files: we had no access to a model hub, nor to the corpora.
# tests/test_recipe.py runs this script on toy files in the same layouts, with stand-ins for the downloads.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-smollm-135m}
case $MODEL in  # the config of the model that starts from it
    smollm-135m) SIZE=150m ;; smollm-360m) SIZE=400m ;; smollm-1.7b) SIZE=2b ;;
    *) echo "MODEL=$MODEL: give smollm-135m, smollm-360m or smollm-1.7b" >&2; exit 1 ;;
esac
GPUS=${GPUS:-4} MACHINE=${MACHINE:-0/1} RAW=${RAW:-raw} OPTIONS=${OPTIONS:-}
TEXT="--tokenizer=weights/$MODEL/tokenizer.json --shard=$MACHINE $OPTIONS"
SPEECH="--units=units/mhubert --shard=$MACHINE $OPTIONS"
PAIRED="$TEXT $SPEECH"
MAKE="torchrun --nproc_per_node=$GPUS -m"  # one process for each GPU; together they take this machine's share

unpack() {  # unpack NAME URL [FOLDER]: download an archive and unpack it into raw/ or a folder in it, once
    local folder=$RAW/${3:-}
    [ -e "$RAW/$1.unpacked" ] && return
    mkdir -p "$folder"
    curl -fL --retry 9 -C - -o "$RAW/$1.tar" "$2"  # goes on where it stopped
    tar xf "$RAW/$1.tar" -C "$folder"
    rm "$RAW/$1.tar" && touch "$RAW/$1.unpacked"
}
dataset() {  # dataset REPOSITORY FOLDER PATTERNS...: download files of a dataset on the hub into raw/FOLDER
    hf download "$1" --repo-type dataset --local-dir "$RAW/$2" --include "${@:3}"
}

packages() {
    pip install -e '.[corpora,convert,hub]'
}
weights() {  # Apache 2.0
    local name=${MODEL^^}  # smollm-135m is SmolLM-135M on the hub
    hf download "HuggingFaceTB/${name/SMOLLM/SmolLM}" config.json model.safetensors tokenizer.json \
        --local-dir "weights/$MODEL"
}
units() {  # mHuBERT in transformers' layout, as slamkit uses it, and TWIST's k-means; both are under MIT's licence
    hf download slprl/mhubert-base-25hz --local-dir hubert/mhubert-base-25hz
    mkdir -p "$RAW" && curl -fL --retry 9 -o "$RAW/km500.bin" \
        https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin
    [ -e units/mhubert ] || python -m tools.convert units --kmeans="$RAW/km500.bin" --hubert=hubert/mhubert-base-25hz \
        --layer=11 --out=units/mhubert
}
aligner() {  # MMS's aligner as a Wav2Vec2ForCTC; CC BY-NC 4.0
    hf download MahmoudAshraf/mms-300m-1130-forced-aligner --local-dir aligners/mms --exclude '*.bin'
}

# Text: 4, 4, 2 and 2 billion tokens
fineweb_edu() {  # ODC-By
    dataset HuggingFaceTB/smollm-corpus smollm-corpus 'fineweb-edu-dedup/train-0000*'
    python -m corpora.text --source="$RAW/smollm-corpus/fineweb-edu-dedup" --out=data/fineweb-edu --max_tokens=4e9 \
        --val_share=0.001 $TEXT
    python -m corpora.text --source="$RAW/smollm-corpus/fineweb-edu-dedup" --out=data/fineweb-edu-val --max_tokens=4e6 \
        --val_share=0.001 --split=val $TEXT
}
cosmopedia() {  # ODC-By
    dataset HuggingFaceTB/smollm-corpus smollm-corpus 'cosmopedia-v2/train-000[01]*'
    python -m corpora.text --source="$RAW/smollm-corpus/cosmopedia-v2" --out=data/cosmopedia-v2 --max_tokens=4e9 $TEXT
}
python_edu() {  # various licences; the hub has a list of files, which Software Heritage holds
    dataset HuggingFaceTB/smollm-corpus smollm-corpus 'python-edu/*'
    python -m tools.python_edu --source="$RAW/smollm-corpus/python-edu" --out="$RAW/python-edu" --max_files=4e6
    python -m corpora.text --source="$RAW/python-edu" --out=data/python-edu --max_tokens=2e9 $TEXT
}
finemath() {  # ODC-By
    dataset HuggingFaceTB/finemath finemath 'finemath-4plus/train-000[01]*'
    python -m corpora.text --source="$RAW/finemath/finemath-4plus" --out=data/finemath --max_tokens=2e9 $TEXT
}

# Speech without words
librispeech() {  # CC BY 4.0
    for part in dev-clean train-clean-100 train-clean-360 train-other-500; do
        unpack $part https://www.openslr.org/resources/12/$part.tar.gz
    done
    $MAKE corpora.librispeech --source="$RAW/LibriSpeech/dev-clean" --out=data/librispeech-dev --kind=speech $SPEECH
    for part in train-clean-100 train-clean-360 train-other-500; do
        $MAKE corpora.librispeech --source="$RAW/LibriSpeech/$part" --out=data/librispeech/$part --kind=speech $SPEECH
    done
}
librilight() {  # public domain
    for part in small medium large; do
        unpack $part https://dl.fbaipublicfiles.com/librilight/data/$part.tar
        $MAKE corpora.librilight --source="$RAW/$part" --out=data/librilight/$part $SPEECH
    done
}
tedlium() {  # CC BY-NC-ND 3.0
    unpack TEDLIUM_release-3 https://www.openslr.org/resources/51/TEDLIUM_release-3.tgz
    $MAKE corpora.tedlium --source="$RAW/TEDLIUM_release-3/legacy/train" --out=data/tedlium --kind=speech $SPEECH
}
peoples_speech() {  # CC BY and CC BY-SA
    dataset MLCommons/peoples_speech peoples_speech 'clean/train-*'
    $MAKE corpora.peoples_speech --source="$RAW/peoples_speech/clean" --out=data/peoples-speech --kind=speech \
        --shard_by=files $SPEECH
}
voxpopuli() {  # CC0
    for year in {2009..2020} {2009..2020}_2; do  # what VoxPopuli's own script fetches for its subset en_v2
        unpack en_$year https://dl.fbaipublicfiles.com/voxpopuli/audios/en_$year.tar voxpopuli/raw_audios
    done
    $MAKE corpora.voxpopuli --source="$RAW/voxpopuli" --subset=raw --kind=speech --out=data/voxpopuli $SPEECH
}

# Speech with words
stinystories() {  # MIT
    dataset slprl/sTinyStories sTinyStories 'data/*'
    $MAKE corpora.stinystories --source="$RAW/sTinyStories/data" --out=data/stinystories --val_share=0.001 \
        --shard_by=files $PAIRED
    $MAKE corpora.stinystories --source="$RAW/sTinyStories/data" --out=data/stinystories-val --val_share=0.001 \
        --split=val --shard_by=files $PAIRED
}
swc() {  # CC BY-SA
    unpack SWC_English https://www2.informatik.uni-hamburg.de/nats/pub/SWC/SWC_English.tar
    $MAKE corpora.swc --source="$RAW/english" --out=data/swc $PAIRED
    $MAKE corpora.swc --source="$RAW/english" --out=data/swc-speech --kind=speech $SPEECH
}
libriheavy() {  # Apache 2.0; the sound is Libri-Light's
    [ -e "$RAW/large.unpacked" ] || { echo "libriheavy: needs the sound that the step librilight unpacks" >&2; exit 1; }
    dataset pkufool/libriheavy libriheavy 'libriheavy_cuts_small.jsonl.gz' 'libriheavy_cuts_medium.jsonl.gz' \
        'libriheavy_cuts_large.jsonl.gz'
    $MAKE corpora.libriheavy --source="$RAW/libriheavy" --audio="$RAW" --out=data/libriheavy --aligner=aligners/mms $PAIRED
}

check() {  # names everything that is still missing
    python train.py config/train_$SIZE.py --check
}
train() {
    torchrun --nproc_per_node="$GPUS" train.py config/train_$SIZE.py
}

mkdir -p "$RAW" data
for step in ${@:-packages weights units aligner fineweb_edu cosmopedia python_edu finemath librispeech librilight tedlium \
        peoples_speech voxpopuli stinystories swc libriheavy check train}; do
    marker=data/.$step-${MACHINE/\//-of-}.done
    case $step in packages | check | train) marker= ;; weights) marker=weights/.$MODEL.done ;; esac
    if [ -n "$marker" ] && [ -e "$marker" ]; then
        echo "== $step: done already, says $marker"
        continue
    fi
    echo "== $step"
    "$step"
    [ -z "$marker" ] || touch "$marker"
done
