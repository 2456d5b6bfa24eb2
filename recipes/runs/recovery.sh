#!/usr/bin/env bash
# The recovery study: which training finds what a linear probe sees in flux-tiny's tokens. From captions
# to the table of docs/features.md, in the current folder; every command goes on where it was stopped.
# Collecting takes 40 min on two idle cores; the durations of the rest were not measured.
#   bash recipes/runs/recovery.sh
set -euo pipefail
SITES=double.3.img,single.2.img,single.6.img
STEPS=2,5

# ---- Captions: T trains, A picks features, B ranks recipes, C is for the report alone. None is in two of them.
captions() { python -m flux_ir.demo.captions --part "$1" --count "$2" --seed "$3" --alone "$4"; }
captions T 10000 101 700 > T.txt
captions A 1000 202 330 > A.txt
captions B 1000 303 330 > B.txt
captions C 1000 404 330 > C.txt
head -1000 T.txt > R.txt # once more with four noises each: what differs between these is noise

# ---- Activations; pictures where answers are needed
UPDATES=double.3.img.update,single.2.update,single.6.update
collect() { flux-ir collect --model flux-tiny --prompts "$1.txt" --sites $SITES,$UPDATES --steps 2,5,7 --output_dir "captures/$1" "${@:2}"; }
collect T
collect R --repeats 4 --seed 1
for part in A B C; do collect $part --repeats 4 --save_images; done

# ---- Autoencoders: what one would train without knowing, and the recipe that won, three seeds of it
train() { flux-ir train-sae --captures captures/T --site $SITES --steps $STEPS --held_out 0.02 --dtype bfloat16 --name "$@"; }
train topk --arch topk --k 16 --max_tokens 4000000
train batch_topk --arch batch_topk --k 16 --max_tokens 4000000
train recovery --arch matryoshka --k 16 --prefixes 48,96,192,384 --whiten captures/R --lr 0.002 --batch_tokens 1024 --max_tokens 2000000 --seed 0,1,2

# ---- What their features know: picked on A, recipes ranked on B; C is opened once, for the report
score() { flux-ir score-concepts --sae "$1" --captures captures/A --report "captures/$2" --output_dir "concepts/$2" --name "$(basename "$(dirname "$1")")-$(basename "$1")"; }
for sae in saes/*/*_s?; do score "$sae" B; done
for sae in saes/*/*_s?; do score "$sae" C; done
