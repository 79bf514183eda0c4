#!/bin/sh
# Fine-tune RUN on TEXT with weights and experts shared by all processes, on one machine or several:
#     recipes/launch/torchrun.sh RUN TEXT --batch-size 8 ...
# On several, start it on each with the same NODES, HEAD (one of them) and GPUS (of each); OUT has to
# lie in a folder that all of them share. After a stop, the same command goes on from the last
# checkpoint; on fewer processes it names the --gradient-accumulation-steps that this takes.
set -eu
run=$1 text=$2
shift 2
NODES=${NODES:-1} HEAD=${HEAD:-localhost} PORT=${PORT:-29500}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$GPUS" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="${SLURM_JOB_ID:-moefy}" \
    -m moefy finetune "$run" --data "$text" \
    --recipe "$(dirname "$0")/../finetune-many-gpus.toml" \
    --set fsdp="$((NODES * GPUS))" --set expert_parallel="$GPUS" "$@"
