#!/bin/sh
# Multi30k English-German, Transformer-tiny, by data diversification (Nguyen et al. 2020): the default recipe and its reverse
# each translate the training text, and the default recipe's model learns on from both and from what was there before.
# Measured: test_2016 BLEU 41.28 by the student's best checkpoint, 41.43 by its last (lower-cased, tokenised; beam 5), validation 42.48
# and 42.63. Cost: 62 million target tokens, an hour on two cores (Zen 5), reckoned at 17,000 to 20,000 tokens/s: 27 for the forward
# model (26.5 minutes), 12 for the backward one, 23 for the student, and a minute for each translation. docs/log.md, 2026-11-29. Interrupted, the same command goes on.
#     sh configs/multi30k-en-de-diverse.sh FOLDER-OF-TEXT FOLDER-FOR-RUNS
set -eu
config=$(dirname "$0")/multi30k-en-de-transformer.toml
text=$(cd "${1:?expected the folder of train.en and the others}" && pwd)
mkdir -p "${2:?expected a folder for the runs}"
runs=$(cd "$2" && pwd)

train() {
    name=$1
    shift
    regard train "$config" --set data.root="$text" --out "$runs/$name" "$@"
}
translated() { # by a run, a file, to another
    [ -f "$3" ] || { regard translate "$runs/$1" <"$2" >"$3.part" && mv "$3.part" "$3"; }
}
pair() { echo "{ source = '$1', target = '$2' }"; }

train forward
train backward --set data.train="[$(pair train.de train.en)]" --set data.valid="$(pair val.de val.en)" \
    --set data.test="$(pair test_2016.de test_2016.en)" --set tokenizer.take_from="$runs/forward" --set train.steps=3200
translated forward "$text/train.en" "$runs/forward.de"
translated backward "$text/train.de" "$runs/backward.en"
train student --set train.start_from="$runs/forward/checkpoints/step-00007000" --set tokenizer.take_from="$runs/forward" \
    --set data.train="[$(pair train.en train.de), $(pair train.en "$runs/forward.de"), $(pair "$runs/backward.en" train.de)]" \
    --set train.steps=6000 --set train.learning_rate=2.5e-3 --set train.validate_every=500
