"""4-bit weights with two activation-aware codebooks per layer (AAAC), as a torchao extension."""
