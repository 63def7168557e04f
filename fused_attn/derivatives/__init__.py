"""How torch differentiates a call: eager, in `torch.func`, and as registered operators."""
