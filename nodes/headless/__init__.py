"""Runs API-format workflows without ComfyUI."""
