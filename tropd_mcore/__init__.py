"""TrOPD: on-policy distillation of large teachers on Megatron-Core, with SGLang rollouts."""

__version__ = "0.1.0"
