"""Growing while training: when, where and how; the training loop that does it."""
