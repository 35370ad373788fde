#!/usr/bin/env bash
# Train from one YAML file. This script calls `tropd train`. Other arguments are overrides (rollout.temperature=0.9),
# --dry-run, or those of `tropd train --help`.
#   bash examples/tropd_pretrain.sh configs/quickstart-cpu.yaml [key=value ...]         the script starts the ranks
#   torchrun --nproc-per-node 8 --no-python examples/tropd_pretrain.sh CONFIG [...]      torchrun starts the ranks
# Run the same command again to resume the run in its run.dir. For several nodes, see docs/launch.md.
set -euo pipefail

PYTHON="${PYTHON:-python}"                      # interpreter of the environment that holds tropd_mcore
exec "$PYTHON" -m tropd_mcore.cli.main train "$@"
