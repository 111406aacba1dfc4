"""Task vectors and single prompts' activations: what they are, how they are captured and collected, and what belongs
together."""

from vtv_nnsight.vectors.capturing import capture
from vtv_nnsight.vectors.values import Activations, TaskVector, TaskVectors, zero_vector

__all__ = ["Activations", "TaskVector", "TaskVectors", "capture", "zero_vector"]
