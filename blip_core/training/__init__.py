"""One training loop; pre-training and fine-tuning are settings of it."""
