"""Models that are compared with, and have no heads to patch or a tokenizer that is not theirs."""
