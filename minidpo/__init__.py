"""minidpo: preference alignment for language models, from scratch in plain PyTorch."""
