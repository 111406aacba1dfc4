"""The studies of *Visual Prompting via Image Inpainting* (NeurIPS 2022, §4.3 and §4.4)."""
