#!/bin/sh
# Multi30k English-German, Transformer-tiny, further than multi30k-en-de-transformer.toml goes by itself: a longer base, two
# branches that are trained further from its end, each otherwise, and the mean of their weights (Wortsman et al. 2022).
# Measured: test_2016 BLEU 40.53 (lower-cased, tokenised; beam 5), where base alone has 39.76, r-drop 40.09 and ema 39.70; about
# 91 minutes of a core in bfloat16 (Zen 4): 51, 30 and 10. docs/log.md, 2026-11-21. Interrupted, the same command goes on.
#     sh configs/multi30k-en-de-mean.sh FOLDER-OF-TEXT FOLDER-FOR-RUNS
set -eu
config=$(dirname "$0")/multi30k-en-de-transformer.toml
text=${1:?expected the folder of train.en and the others} runs=${2:?expected a folder for the runs}

train() {
    name=$1
    shift
    regard train "$config" --set data.root="$text" --set train.average=1 --set train.ema=0 \
        --out "$runs/$name" "$@"
}
further() { # from the end of the base
    train "$@" --set train.start_from="$runs/base/checkpoints/step-00005400" --set tokenizer.take_from="$runs/base" \
        --set train.warmup=100 --set train.validate_every=200
}

train base --set train.steps=5400 --set train.schedule=cosine --set train.warmup=800
further r-drop --set train.steps=1400 --set train.schedule=cosine --set train.learning_rate=2e-3 --set train.r_drop=5
further ema --set train.steps=1000 --set train.schedule=constant --set train.learning_rate=2.5e-3 --set train.ema=0.998
regard export "$runs/r-drop" "$runs/ema" --to folder --checkpoint last --force --out "$runs/mean"
