"""Everything that touches Megatron-Core: platform, parallel layout, model, pipeline, optimizer, checkpoints."""

import warnings

# On import Megatron repeats these warnings for each module and each rank. `mcore.platform` already chooses between
# Transformer Engine and the CPU modules, and logs that choice once.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="Apex is not installed")
