#!/bin/bash
# Activations of FLUX.1 from machines none of whose GPUs holds its transformer: every process has a part of each weight
# (FSDP2), and prompts of its own. Start this on every machine, with the same values; the first one is HEAD:
#
#   HEAD=first-machine NODES=2 GPUS=8 PROMPTS=/shared/prompts.txt OUT=/shared/captures/mid ./collect_sharded.sh
#
# OUT and PROMPTS are on a drive that all machines see; OUT may be a URL. The same command goes on where it was cut off,
# on another number of machines as well. Under Slurm start it by `srun --ntasks-per-node 1`, with JOB=$SLURM_JOB_ID.
#
# NOT RUN ON GPUs: the tests run its command with two processes on a CPU. By arithmetic, FLUX.1 [schnell] in bf16 over 16
# GPUs is 1.5 GB of blocks on each, 0.1 GB for the layers around them, and 1.4 GB for two blocks that are gathered; then
# come the activations of a batch. Every forward moves all blocks, 23.7 GB, to every GPU, whatever the batch: at 25 GB/s
# between machines that is 1 s, so BATCH should be as large as fits.
set -euo pipefail

HEAD=${HEAD:?the name or address of the first machine}
PROMPTS=${PROMPTS:?a file of prompts that all machines see}
OUT=${OUT:?a folder that all machines see, or a URL}
NODES=${NODES:-2}
GPUS=${GPUS:-8}
BATCH=${BATCH:-4}
MODEL=${MODEL:-flux-schnell}
SITES=${SITES:-double.18.img}
PORT=${PORT:-29500}
JOB=${JOB:-collect}

torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "$JOB" \
  -m flux_ir collect --fsdp --model "$MODEL" --batch_size "$BATCH" \
  --prompts "$PROMPTS" --sites "$SITES" --output_dir "$OUT" "$@"
