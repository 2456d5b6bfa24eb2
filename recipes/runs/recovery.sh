#!/usr/bin/env bash
# The recovery study: which training finds what a linear probe sees in flux-tiny's tokens. From captions
# to the table of docs/features.md, in the current folder; every command goes on where it was stopped.
# About two hours on two cores: collecting 25 min to 40, training 20, the rest is scoring, most of it the null.
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

# ---- Autoencoders: what one would train without knowing, and the recipe that won, three seeds of it at its best place
train() { flux-ir train-sae --captures captures/T --held_out 0.02 --dtype bfloat16 --max_tokens "$1" --name "${@:2}"; }
REC="--arch matryoshka --k 16 --prefixes 48,96,192,384 --whiten captures/R --lr 0.002 --batch_tokens 1024"
for arch in topk batch_topk; do train 2000000 $arch --site $SITES --steps $STEPS --arch $arch --k 16; done
for seed in 0 1 2; do train 2000000 recovery_5 --site double.3.img --steps 5 $REC --seed $seed; done
train 2000000 recovery_5 --site single.2.img,single.6.img --steps 5 $REC
train 2000000 recovery_2 --site $SITES --steps 2 $REC

# ---- What their features know: picked on A, recipes ranked on B; C is opened once, for the report
score() { flux-ir score-concepts --sae "$1" --captures captures/A --report "captures/$2" --output_dir "concepts/$2" --name "$(basename "$(dirname "$1")")-$(basename "$1")" "${@:3}"; }
for sae in saes/recovery_5/double*; do score $sae B --rows sae --bootstrap 0; done
score saes/recovery_5/double.3.img_matryoshka_k16_x8_s0 C --null 200 --run_model
for sae in saes/*topk/*_s0 saes/recovery_5/double*_s[12]; do score $sae C --rows sae,k_sparse_5; done
for sae in saes/recovery_5/single* saes/recovery_2/*_s0; do score $sae C --rows sae,k_sparse_5,probe,null --null 40; done
python "$(dirname "$0")/concept_tables.py" concepts/C/recovery_5-double* concepts/C/*
