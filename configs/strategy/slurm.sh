#!/bin/bash
# A run under SLURM that continues after its time limit, a preemption or a lost node:
#   NAME=my_run sbatch configs/strategy/slurm.sh --config my_run.yaml --config configs/strategy/fsdp2.yaml
# Arguments after the script's name go to `dots fit`. Lightning reads ranks, hosts and port from SLURM's variables.
#SBATCH --job-name=dots
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# SIGTERM to the tasks (not to this script) this many seconds before the end: a step and its checkpoint must fit in.
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

DOTS=${DOTS:-.venv/bin/dots}
RUNS=${RUNS:-runs} # a folder that all hosts see
: "${NAME:?set NAME, the name of the run below $RUNS}"

code=0
srun --kill-on-bad-exit=1 "$DOTS" fit "$@" --ckpt_path last \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.logger.save_dir "$RUNS" --trainer.logger.name "$NAME" || code=$?

# Of the newest version that has one.
summary=$(find "$RUNS/$NAME" -path "*/version_*/summary.json" 2> /dev/null | sort -V | tail -n 1)
if [ "$code" -eq 0 ] && [ -n "$summary" ] && grep -q '"completed": true' "$summary"; then
    echo "completed: $summary"
elif [ "$code" -eq 0 ] || [ "$code" -eq 143 ]; then
    # Stopped by SIGTERM, after the checkpoint of its step.
    scontrol requeue "$SLURM_JOB_ID"
else
    exit "$code"
fi
