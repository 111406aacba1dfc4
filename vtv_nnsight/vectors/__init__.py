"""Task vectors and single prompts' activations: what they are, how they are captured and collected, and what belongs
together."""

from vtv_nnsight.vectors.capturing import capture, zero_vector
from vtv_nnsight.vectors.values import Activations, TaskVector, TaskVectors

__all__ = ["Activations", "TaskVector", "TaskVectors", "capture", "zero_vector"]
