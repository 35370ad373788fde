"""Everything that touches Megatron-Core: platform, parallel layout, model, pipeline, optimizer, checkpoints."""

import warnings

# Megatron warns on import, from each module and rank, about what `mcore.platform` decides and logs once.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="Apex is not installed")
