"""Hugging Face folders and the map between their tensors and Megatron's: pure torch and safetensors, no Megatron."""
