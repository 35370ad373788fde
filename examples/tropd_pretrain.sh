#!/usr/bin/env bash
# Train from one YAML file: `tropd train` by the name of a script. Further arguments are overrides
# (rollout.temperature=0.9), --dry-run, or those of `tropd train --help`.
#   bash examples/tropd_pretrain.sh configs/quickstart-cpu.yaml [key=value ...]         starts the ranks itself
#   torchrun --nproc-per-node 8 --no-python examples/tropd_pretrain.sh CONFIG [...]      is started by torchrun
# The same command again resumes the run in its run.dir. Several nodes: docs/launch.md.
set -euo pipefail

PYTHON="${PYTHON:-python}"                      # interpreter of the environment that holds tropd_mcore
exec "$PYTHON" -m tropd_mcore.cli.main train "$@"
