"""What can be done about the prompt: the studies of *Visual Prompting via Image Inpainting* (NeurIPS 2022, §4.3 and
§4.4), examples that are retrieved (arXiv 2301.13670), a border that is learned (arXiv 2311.03648)."""
