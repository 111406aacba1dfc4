"""Studies with the core: circuits, prompting, clusters, learned vectors, function vectors, released files."""
