"""How one shard is computed on one device: the only package that may import torch and its kin."""
