# shellcheck shell=bash
# Sourced by every batch script, on the first node of a job: what differs from site to site. Edit it to fit yours.

# --- Software ---------------------------------------------------------------------------------------------------------
# Environment modules, where the site has them:
#   module purge; module load python/3.11 cuda/12.8
# conda:
#   source "$HOME/miniforge3/etc/profile.d/conda.sh"; conda activate dsmoelora
# A container: the words that stand before `python` on every node.
#   container=(apptainer exec --nv --bind "$PWD" dsmoelora.sif)
# shellcheck disable=SC2034  # for the scripts that source this file
container=()

# The project's environment if there is one (made by `make install`), else the python that is loaded.
python=python
[[ -x .venv/bin/python ]] && python=$PWD/.venv/bin/python
# The launchers start its programs by name.
if command -v "$python" >/dev/null; then PATH="$(dirname "$(command -v "$python")"):$PATH"; fi
export PATH

# --- Folders ----------------------------------------------------------------------------------------------------------
# Home folders are often small, and slow for many readers: models and tokenised data go elsewhere.
#   export HF_HOME=/scratch/$USER/huggingface

# --- Cores ------------------------------------------------------------------------------------------------------------
# srun of Slurm 22.05 and later no longer takes this over from the job, and would give each task a single core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# --- Network ----------------------------------------------------------------------------------------------------------
# NCCL ends a collective whose peer is gone, instead of waiting for ever (the default of today's torch, not of older ones).
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Warnings name the network that NCCL chose when it has none that works; INFO tells all it does, for a first run.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# With several networks in a node, NCCL and gloo may take the slow one, or one that does not reach the other nodes. Name
# the right one (see `ip -br addr`); InfiniBand adapters are chosen by NCCL_IB_HCA.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# Where the fabric has a plugin (EFA, Slingshot), it is found through the library path of its module:
#   module load aws-ofi-nccl
