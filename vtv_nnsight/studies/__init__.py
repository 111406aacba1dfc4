"""Studies with the core: circuits, prompting, clusters, learned vectors, banks of vectors, released files."""
