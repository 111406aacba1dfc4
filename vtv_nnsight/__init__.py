"""Find, inspect and use visual task vectors in MAE-VQGAN: an nnsight plugin."""
