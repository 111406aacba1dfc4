"""Task vectors and single prompts' activations: what they are, how they are collected, and what belongs together."""

from vtv_nnsight.vectors.values import Activations, TaskVector, TaskVectors, zero_vector

__all__ = ["Activations", "TaskVector", "TaskVectors", "zero_vector"]
