"""A restricted unpickler that builds only data; ``archives.py`` opens what pickles come in.

A pickle is a program: it may call any function by name, set any attribute, and declare any size. This unpickler accepts
only the names in ``BUILDERS``, and builds their objects with functions of its own that check their arguments. Other
names are refused, as are opcodes that checkpoints do not need. PyTorch's ``weights_only`` unpickler does not check
sizes and does not read TorchScript.
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

MAX_DEPTH = 64  # of nested lists and dicts
MAX_VALUES = 500_000  # in one file; shared values count each time
MAX_SHARED = 4
# Types of keys. Tuples are not allowed: hashing nested tuples can take forever.
_KEYS = (str, int, float, bytes, type(None))


class ForbiddenName(pickle.UnpicklingError):
    """A pickle calls something that is not data; the message is its name."""


class Storage(NamedTuple):
    """Memory of tensors: uint8 [bytes], and the dtype in the file."""

    memory: Tensor
    dtype: torch.dtype


class Builder:
    """Replaces a callable that a pickle names."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build


class ScriptModule:
    """The attributes of a module in a TorchScript archive, without its code."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


def tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """A view of a storage that lies within it and is no larger."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or not isinstance(storage.dtype, torch.dtype):
        raise ValueError(f'a tensor in a {type(storage).__name__}')
    if len(size) != len(stride) or len(size) > MAX_DEPTH or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f'a tensor of size {size} and stride {stride}')
    held = len(storage.memory) // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > held or (math.prod(size) and last >= held):
        raise ValueError(f'a tensor of size {list(size)} in a storage of {held} numbers')
    view = torch.empty(0, dtype=storage.dtype, device='cpu')
    return view.set_(storage.memory.untyped_storage(), offset, size, stride)


def tensor_of_dtype(storage: Storage, offset: int, size: tuple, stride: tuple, grad: Any, hooks: Any, dtype, *_: Any):
    """A view of an untyped storage."""
    return tensor(storage._replace(dtype=dtype), offset, size, stride)


def numpy_dtype(name: str, *_: Any) -> np.dtype:
    """A numeric dtype of fixed size; strings and objects are refused, as a file can forge their size or content."""
    dtype = np.dtype(name) if isinstance(name, str) else None
    if dtype is None or dtype.kind not in 'biufc' or dtype.subdtype or not dtype.isnative:
        raise ForbiddenName(f'numpy.dtype({name!r})')
    return dtype


def numpy_scalar(dtype: np.dtype, content: bytes) -> np.generic:
    if len(content) != dtype.itemsize:
        raise ValueError(f'{len(content)} bytes for a {dtype}')
    return np.frombuffer(content, dtype)[0]


def history_method(owner: Any, name: Any) -> None:
    """Replaces ``getattr``, with which a pickled HistoryBuffer refers to its own methods; nothing to restore."""
    if owner is not BUILDERS[_HISTORY] or name not in ('min', 'max', 'current', 'mean'):
        raise ForbiddenName(f'builtins.getattr(..., {name!r})')


def ordered_dict(pairs: Any = ()) -> OrderedDict:
    return OrderedDict((checked_key(key), value) for key, value in pairs)


def checked_key(key: Any) -> Any:
    if not isinstance(key, _KEYS):
        raise ValueError(f'a {type(key).__name__} as a key')
    return key


_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = dict(
    FloatStorage='float32', DoubleStorage='float64', HalfStorage='float16', BFloat16Storage='bfloat16',
    LongStorage='int64', IntStorage='int32', ShortStorage='int16', CharStorage='int8', ByteStorage='uint8',
    BoolStorage='bool', ComplexFloatStorage='complex64', ComplexDoubleStorage='complex128', UntypedStorage='uint8',
)  # fmt: skip
BUILDERS: dict[str, Any] = {
    'collections.OrderedDict': Builder(ordered_dict),
    'collections.Counter': Builder(lambda counts=(): Counter(ordered_dict(dict(counts).items()))),
    'builtins.set': Builder(lambda values=(): {checked_key(value) for value in values}),
    'argparse.Namespace': Builder(argparse.Namespace),
    'torch._utils._rebuild_tensor': Builder(tensor),
    'torch._utils._rebuild_tensor_v2': Builder(tensor),
    'torch._utils._rebuild_tensor_v3': Builder(tensor_of_dtype),
    'torch._utils._rebuild_parameter': Builder(lambda value, *_: value),
    'torch._utils._rebuild_parameter_with_state': Builder(lambda value, *_: value),
    'torch._tensor._rebuild_from_type_v2': Builder(lambda builder, kind, args, state: builder.build(*args)),
    'torch.nn.parameter.Parameter': None,  # named by the line above
    'torch.Size': Builder(lambda size=(): torch.Size(size)),
    'torch.device': Builder(torch.device),
    'numpy.ndarray': Builder(None),  # named by the next line
    'numpy.core.multiarray._reconstruct': Builder(lambda *_: np.empty(0)),
    'numpy.core.multiarray.scalar': Builder(numpy_scalar),
    'numpy.dtype': Builder(numpy_dtype),
    # bytes, in the protocols of Python 2
    '_codecs.encode': Builder(lambda text, encoding: text.encode({'latin1': 'latin1'}[encoding])),
    'builtins.getattr': Builder(history_method),
    _HISTORY: Builder(HistoryBuffer),
    # TorchScript's
    'torch.jit._pickle.restore_type_tag': Builder(lambda value, kind: value),
    **{f'torch.jit._pickle.build_{kind}list': Builder(list) for kind in ('int', 'tensor', 'double', 'bool')},
    **{f'torch.{name}': _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    **{f'torch.storage.{name}': _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    **{f'torch.{name}': dtype for name, dtype in _DTYPES.items()},
}


class DataUnpickler(pickle._Unpickler):
    """Reads one pickle; :class:`ForbiddenName` names what is not data, other exceptions mean that it is damaged.

    Args:
        file: the pickle.
        load_storage: what persistent ids stand for.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, load_storage: Callable[[tuple], Storage]) -> None:
        super().__init__(file, encoding='utf-8')
        self.persistent_load = load_storage

    def find_class(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'
        if full.startswith('__torch__.'):
            return Builder(ScriptModule)
        full = full.replace('numpy._core.', 'numpy.core.').replace('__builtin__.', 'builtins.')
        if full not in BUILDERS:
            raise ForbiddenName(f'{module}.{name}')
        return BUILDERS[full]

    def build_object(self) -> None:
        """REDUCE and NEWOBJ: call a builder, and nothing else."""
        arguments = self.stack.pop()
        builder = self.stack[-1]
        if not isinstance(builder, Builder) or type(arguments) is not tuple:
            raise ForbiddenName(f'a {type(builder).__name__}')
        self.stack[-1] = builder.build(*arguments)

    def set_state(self) -> None:
        """BUILD: set what the few types have that need it."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, np.ndarray):
            _, shape, dtype, _, content = state
            if not isinstance(content, bytes) or math.prod(shape) * dtype.itemsize != len(content):
                raise ValueError(f'an array of {shape} in {len(content)} bytes')
            target.__setstate__(state)
        elif isinstance(target, np.dtype):
            if state[1] not in ('<', '=', '|'):
                raise ValueError('numbers in another byte order')
        elif isinstance(target, HistoryBuffer):
            arrays = state['_log_history'], state['_count_history']
            if not all(isinstance(each, np.ndarray) and each.ndim == 1 for each in arrays):
                raise ValueError('a history that is no list of numbers')
            target.__init__(*arrays, max_length=int(state.get('max_length', 1_000_000)))
        elif isinstance(target, argparse.Namespace):
            vars(target).update((str(key), value) for key, value in state.items())
        elif isinstance(target, ScriptModule):
            target.attributes.update((str(key), value) for key, value in state.items())
        elif not isinstance(target, OrderedDict):  # a state dict's says the version of each module
            raise ForbiddenName(f'the state of a {type(target).__name__}')

    def target(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f'a {type(self.stack[-1]).__name__} in place of a {kind.__name__}')
        return self.stack[-1]

    def set_items(self) -> None:
        items = self.pop_mark()
        target = self.target(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.target(dict)[checked_key(key)] = value

    def make_dict(self) -> None:
        items = self.pop_mark()
        self.append({checked_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def append_items(self) -> None:
        items = self.pop_mark()
        self.target(list).extend(items)

    def append_item(self) -> None:
        value = self.stack.pop()
        self.target(list).append(value)

    def add_items(self) -> None:
        items = self.pop_mark()
        self.target(set).update(map(checked_key, items))


_UNUSED = (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.FROZENSET, pickle.PERSID,
)  # fmt: skip
for _opcode in _UNUSED:
    DataUnpickler.dispatch.pop(_opcode[0], None)
DataUnpickler.dispatch |= {
    pickle.REDUCE[0]: DataUnpickler.build_object,
    pickle.NEWOBJ[0]: DataUnpickler.build_object,
    pickle.BUILD[0]: DataUnpickler.set_state,
    pickle.SETITEM[0]: DataUnpickler.set_item,
    pickle.SETITEMS[0]: DataUnpickler.set_items,
    pickle.DICT[0]: DataUnpickler.make_dict,
    pickle.APPEND[0]: DataUnpickler.append_item,
    pickle.APPENDS[0]: DataUnpickler.append_items,
    pickle.ADDITEMS[0]: DataUnpickler.add_items,
}


def check_tree(value: Any, size: int) -> None:
    """Refuse values that are nested without end, and more numbers than the file can hold.

    Args:
        value: What a pickle gave.
        size: Bytes of the file; weights may share storages, so up to ``MAX_SHARED`` times that are taken.

    Raises:
        ValueError: lists within lists without end, or more values than any checkpoint has.
    """
    count, nbytes, left = 0, 0, [(value, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, ScriptModule):
            value = value.attributes
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        count += len(inner)
        nbytes += value.nbytes if isinstance(value, Tensor) else 0
        if depth > MAX_DEPTH or count > MAX_VALUES or nbytes > MAX_SHARED * size:
            raise ValueError('more values than the file can hold')
        left.extend((each, depth + 1) for each in inner)
