"""Reads and writes Hugging Face folders and maps their tensors to Megatron's, with torch and safetensors only."""
