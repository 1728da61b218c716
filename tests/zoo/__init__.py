"""Architectures of timm and transformers, small and with random weights, through export, folding and verification."""
