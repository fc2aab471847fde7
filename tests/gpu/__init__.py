"""Tests on CUDA devices. See docs/gpu.md."""
