"""Pruning a folder of safetensors without building its model."""
