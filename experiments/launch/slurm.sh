#!/bin/bash
# A sweep over GPUs of several machines by Slurm: one process a GPU, as JAX expects there.
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 experiments/launch/slurm.sh CONFIG OUT
#
# OUT lies on a disk that all machines have, as the first process may be on another one next time.
# Five minutes before its time is over, or as it is preempted, the job gets SIGTERM: it stops after
# the epoch that is under way, and Slurm puts it into the queue again. It goes on from there. Give
# more time (sbatch --signal=TERM@900) where an epoch takes longer.
#SBATCH --job-name=madjax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -u

srun --kill-on-bad-exit=1 madjax sweep "$1" --out "$2" --distributed --resume
status=$?
# Of a job that is preempted Slurm does this itself; one that was cancelled is to stay so.
left=$((${SLURM_JOB_END_TIME:-0} - $(date +%s)))
if [ "$status" -eq 143 ] && [ "$left" -lt 900 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
