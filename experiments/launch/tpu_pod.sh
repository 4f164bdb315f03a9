#!/bin/bash
# A sweep over a Cloud TPU pod slice: the same command on each of its machines.
#
#     TPU_NAME=... ZONE=... experiments/launch/tpu_pod.sh CONFIG OUT
#
# Each machine has madjax, the data, and JAX for TPUs (pip install "jax[tpu]"). OUT is a directory
# of the first machine; give one on a disk that outlives it, where the slice may be preempted. The
# same command again goes on from the last whole epoch. Ctrl-C here ends the connection and not the
# sweep; to stop it, give the machines the command 'pkill -TERM madjax' in the same way.
set -eu

gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
    --command="madjax sweep '$1' --out '$2' --distributed --resume"
