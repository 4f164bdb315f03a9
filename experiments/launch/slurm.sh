#!/bin/bash
# A sweep over GPUs of several machines by Slurm: one process a GPU, as JAX expects there.
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 experiments/launch/slurm.sh CONFIG OUT
#
# OUT lies on a disk that all machines have, as the first process may be on another one next time.
# Two minutes before its time is over, or as it is preempted, the job gets SIGTERM: it stops after
# the epoch that is under way, and Slurm puts it into the queue again. It goes on from there.
#SBATCH --job-name=madjax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -u

srun --kill-on-bad-exit=1 madjax sweep "$1" --out "$2" --distributed --resume
status=$?
if [ "$status" -eq 143 ]; then # stopped by SIGTERM; when preempted, Slurm does this itself
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
