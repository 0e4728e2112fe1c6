"""Read a pickle of plain data: lists, tuples, text, bytes, booleans, numbers and numpy arrays, and nothing else.

Python's own unpickler can call whatever a file names. Here pickletools only splits the file into instructions, and a
machine with a fixed set of them follows: a name is looked up in a short table of our own, nothing is ever imported or
called by a name, and an instruction that isn't in the set ends the reading. All memory taken is in proportion to the
bytes that are there, never to a length that they claim or to how often they are mentioned. Strings of Python 2 become
bytes.
"""
import pickletools
import re
import struct

import numpy as np

MAX_OPERATIONS = 4_000_000   # the largest real sets have half a million; each instruction may cost 100 bytes
DAMAGED = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error)


class Refused(Exception):
    """The file is not to be used. The message is the reason, without the file's name."""


def load(data):
    """Return what a pickle holds.

    Args:
        data: bytes, of any pickle protocol.

    Raises:
        Refused: damaged, no pickle, over MAX_OPERATIONS, or anything in it that is not plain data.
    """
    machine = _Machine(4 * len(data) + 1000)  # an array's bytes are handled twice at most
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPERATIONS:
                raise Refused(f"it has over {MAX_OPERATIONS:,} instructions")
            if operation.name not in _OPERATIONS:
                raise Refused(f"it has the instruction {operation.name}, which plain data has no use for")
            _OPERATIONS[operation.name](machine, argument)
        return machine.pop()
    except DAMAGED:
        raise Refused("it is damaged or no pickle") from None


class _Name:
    """A name of _BUILDERS that the file mentions; the file never gets at the function itself."""

    def __init__(self, name):
        if name not in _BUILDERS:
            raise Refused(f"it asks for {ascii(name[:60])[1:-1]}")
        self.name = name


class _Dtype:
    """A numpy dtype; the byte order comes in a second instruction."""

    def __init__(self, name, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", _text(name)):
            raise Refused(f"it has an array of the type {ascii(_text(name)[:40])}")
        self.value = np.dtype(_text(name))

    def build(self, state):
        if any(part is not None for part in state[2:5]):
            raise Refused("it has an array of a compound type")
        self.value = self.value.newbyteorder(_text(state[1]))


class _Machine:
    """The stack, the stacks that MARK laid aside, the memo, and how many more bytes may be handed to builders."""

    def __init__(self, budget):
        self.stack, self.marked, self.memo, self.budget = [], [], {}, budget

    def push(self, value):
        self.stack.append(value)

    def pop(self):
        return self.stack.pop()

    def mark(self):
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self):
        values, self.stack = self.stack, self.marked.pop()
        return values

    def extend(self, values):
        if type(self.stack[-1]) is not list:
            raise ValueError
        self.stack[-1].extend(values)

    def take(self, count):
        if count > len(self.stack):
            raise IndexError
        values, self.stack[-count:] = tuple(self.stack[-count:]), []
        self.push(values)

    def remember(self, index):
        self.memo[index] = self.stack[-1]

    def name(self):
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError
        self.push(_Name(f"{module}.{name}"))

    def call(self):
        arguments, name = self.pop(), self.pop()
        if type(name) is not _Name:
            raise ValueError
        self.spend(arguments)
        self.push(_BUILDERS[name.name](*arguments))

    def build(self):
        state, target = self.pop(), self.stack[-1]
        self.spend(state)
        if type(target) is np.ndarray:
            _fill(target, *state)
        else:
            target.build(state)  # only _Dtype has it; the AttributeError of anything else means damage

    def spend(self, arguments):
        """Count the bytes of a builder's arguments, which may copy them: one string can be named a million times."""
        if type(arguments) is not tuple:
            raise ValueError
        self.budget -= sum(len(value) for value in arguments if type(value) in (bytes, str))
        if self.budget < 0:
            raise Refused("it unfolds to many times its size")


def _text(value):
    value = value.decode("ascii") if type(value) is bytes else value
    if type(value) is not str:
        raise ValueError
    return value


def _encode(text, encoding):
    """What Python 3 writes for bytes in the protocols of Python 2."""
    if _text(encoding) not in ("latin1", "latin-1"):
        raise ValueError
    return text.encode("latin-1")


def _uncallable(*_):
    raise Refused("it makes an array that has no data")


def _empty_array(kind, *_):
    if type(kind) is not _Name or kind.name != "numpy.ndarray":
        raise ValueError
    return np.empty(0, np.uint8)


def _fill(array, _, shape, dtype, fortran, data):
    if type(data) is not bytes:  # a list of objects, for an array of the type O
        raise ValueError
    array.__setstate__((1, shape, dtype.value, bool(fortran), data))  # checks that shape and data agree


def _array(data, dtype, shape, order):
    return np.frombuffer(data, dtype.value).reshape(shape, order=_text(order))


def _scalar(dtype, data):
    if len(data) != dtype.value.itemsize:
        raise ValueError
    return np.frombuffer(data, dtype.value)[0].item()


_BUILDERS = {"_codecs.encode": _encode, "numpy.ndarray": _uncallable, "numpy.dtype": _Dtype}
for _core in ("numpy.core", "numpy._core"):
    _BUILDERS |= {f"{_core}.multiarray._reconstruct": _empty_array, f"{_core}.multiarray.scalar": _scalar,
                  f"{_core}.numeric._frombuffer": _array}

_OPERATIONS = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, x: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
                     "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
                    _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda m, x: m.push(x.encode("latin-1"))),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, x: m.push(m.memo[x])),
    "MEMOIZE": lambda m, x: m.remember(len(m.memo)),
    "BYTEARRAY8": lambda m, x: m.push(bytes(x)),
    "NONE": lambda m, x: m.push(None),
    "NEWTRUE": lambda m, x: m.push(True),
    "NEWFALSE": lambda m, x: m.push(False),
    "MARK": lambda m, x: m.mark(),
    "EMPTY_LIST": lambda m, x: m.push([]),
    "EMPTY_TUPLE": lambda m, x: m.push(()),
    "LIST": lambda m, x: m.push(m.since_mark()),
    "TUPLE": lambda m, x: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, x: m.take(1),
    "TUPLE2": lambda m, x: m.take(2),
    "TUPLE3": lambda m, x: m.take(3),
    "APPEND": lambda m, x: m.extend([m.pop()]),
    "APPENDS": lambda m, x: m.extend(m.since_mark()),
    "GLOBAL": lambda m, x: m.push(_Name(x.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda m, x: m.name(),
    "REDUCE": lambda m, x: m.call(),
    "BUILD": lambda m, x: m.build(),
}
