#!/usr/bin/env bash
# Two hosts with 8 Atlas A2 cards each: sbatch docker/slurm.sh. A preempted or timed-out job goes on where it stopped.
#SBATCH --job-name=groundingdino
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --output=groundingdino-%j.log
set -euo pipefail
source /usr/local/Ascend/ascend-toolkit/set_env.sh
# The interface between the hosts, for the host's and the cards' connections. HCCL takes 16 ports from its base port,
# which lie outside those that the system hands out by itself.
export HCCL_SOCKET_IFNAME=${INTERFACE:-eth0} GLOO_SOCKET_IFNAME=${INTERFACE:-eth0}
export HCCL_CONNECT_TIMEOUT=600 HCCL_IF_BASE_PORT=${HCCL_IF_BASE_PORT:-21000}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \
  --rdzv_endpoint="$MASTER:29500" -m groundingdino train --data.root "${DATA:-refcoco}" --run-dir "${RUN:-runs/refcoco}" \
  --precision bf16 --resume auto
