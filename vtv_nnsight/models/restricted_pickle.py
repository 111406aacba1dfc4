"""Pickles, read without running anything of them: they can run code, and users download them.

Nothing that a pickle names is imported here. One that is small and stands for something enormous is refused before it
is read.
"""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

MAX_PICKLED, MAX_STEPS, MAX_PARTS, MAX_DEPTH = 2**24, 1_000_000, 50_000_000, 200
"""Bounds of a pickle: its bytes besides arrays, its instructions, the parts of all the objects that are hashed or given
to a function, counted as often as they are referred to, and how deep they are nested. The published MAE-VQGAN needs
70 kB and 20,000 instructions."""


class Refused(ValueError):
    """A pickle that is not read, and why."""


def check_pickle(stream: BinaryIO) -> int:
    """Refuse a pickle whose objects, because they refer to each other again and again, are larger than any that a
    checkpoint holds; reading one could take hours.

    Follows what the instructions do to the stack, with the number of parts and the depth of each object in the place of
    the object.

    Returns:
        Where in the stream it ends; the stream is left where it was.

    Raises:
        Refused: saying which bound is passed.
    """
    start, handled = stream.tell(), 0
    stack: list[list[int]] = []  # parts and depth of each object
    memo: dict[Any, list[int]] = {}
    marks: list[int] = []
    for step, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if step >= MAX_STEPS:
            raise Refused(f"it has more than {MAX_STEPS:,} instructions")
        name, before = instruction.name, instruction.stack_before
        if name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if argument is not None and argument > step:  # C's unpickler makes room for as many
                raise Refused(f"it numbers an object {argument:,} after {step:,} instructions")
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            held = len(before)
            if pickletools.markobject in before:
                held = before.index(pickletools.markobject) + len(stack) - marks.pop()
            parts = stack[len(stack) - held :]
            del stack[len(stack) - held :]
            if name not in _BUILDING:
                handled += sum(size for size, _ in parts)
            number = argument.bit_length() if isinstance(argument, int) else 0
            grown = parts.pop(0) if name in _GROWING else [1 + number // 64, 0]
            grown[0] += sum(size for size, _ in parts)
            grown[1] = max([grown[1], *(1 + depth for _, depth in parts)])
            if handled > MAX_PARTS or grown[0] > MAX_PARTS:
                raise Refused(f"its objects refer to each other so often that they have over {MAX_PARTS:,} parts")
            if grown[1] > MAX_DEPTH:
                raise Refused(f"its objects are nested more than {MAX_DEPTH} deep")
            stack += [grown] * len(instruction.stack_after)
    end = stream.tell()
    stream.seek(start)
    return end


_BUILDING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "APPEND", "APPENDS", "POP", "POP_MARK")
"""Instructions that look into none of the objects that they take."""
_GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
"""Instructions that put objects into one that there is already."""


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing, and checks a pickle before it reads it.

    Args:
        file: A binary file; one pickle is read, from where it stands.
        known: (module, name) in a pickle → what stands for it. All other names are refused.

    Raises:
        Refused: from `load`, when the pickle is too large, or names anything that is not known.
    """

    def __init__(self, file: BinaryIO, known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file, encoding="latin-1")
        self._file, self._known = file, known

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class or function that the pickle names."""
        if (module, name) not in self._known:
            raise Refused(f"it names {module}.{name}, which is neither a tensor nor an array")
        return self._known[module, name]

    def load(self) -> Any:
        """What the pickle holds."""
        check_pickle(self._file)
        return super().load()


@contextmanager
def refusing(path: str | os.PathLike[str], damaged: str) -> Iterator[None]:
    """Whatever reading a file raises, as one sentence that names it.

    Args:
        path: The file.
        damaged: What a file is that cannot be read, such as "is truncated or damaged".

    Raises:
        ValueError: when anything is raised in the block.
    """
    try:
        yield
    except Refused as error:
        raise ValueError(f"{path} was refused: {error}. Nothing of it was run.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} {damaged}: {str(error) or type(error).__name__}.") from error
