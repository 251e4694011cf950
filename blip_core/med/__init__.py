"""MED, the multimodal mixture of encoder-decoder (BLIP, section 3.1), and its three objectives (section 3.2)."""
