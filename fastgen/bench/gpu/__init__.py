"""What `examples/gpu_check.py` runs: fastgen on one GPU, checked and measured by sections."""
