"""The names that a PyTorch file may have: those of tensors, and of harmless values beside them.

Nothing that a file names is ever imported or called (pickle_machine.py), so these tables decide
what is said: which calls are tensors, which values are left aside with a note, which kinds of
tensor are not supported, and when a file is refused because reading it elsewhere would run code.
"""

import re
from pathlib import Path

import ml_dtypes
import numpy as np

from microdit_jax.errors import UserError, visible

# torch.X -> numpy, and the class that older pickles name a storage of that type by.
DTYPES = {
    "float32": (np.float32, "FloatStorage"),
    "float64": (np.float64, "DoubleStorage"),
    "float16": (np.float16, "HalfStorage"),
    "bfloat16": (ml_dtypes.bfloat16, "BFloat16Storage"),
    "int64": (np.int64, "LongStorage"),
    "int32": (np.int32, "IntStorage"),
    "int16": (np.int16, "ShortStorage"),
    "int8": (np.int8, "CharStorage"),
    "uint8": (np.uint8, "ByteStorage"),
    "bool": (np.bool_, "BoolStorage"),
    "uint16": (np.uint16, None),
    "uint32": (np.uint32, None),
    "uint64": (np.uint64, None),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, None),
    "float8_e5m2": (ml_dtypes.float8_e5m2, None),
    "float8_e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, None),
    "float8_e5m2fnuz": (ml_dtypes.float8_e5m2fnuz, None),
}
STORAGES = {storage: np.dtype(kind) for kind, storage in DTYPES.values() if storage}

# By the names that pickles have.
DTYPE_OF_NAME = {f"torch.{name}": np.dtype(kind) for name, (kind, _) in DTYPES.items()}
STORAGE_DTYPES: dict[str, np.dtype | None] = {f"torch.{n}": kind for n, kind in STORAGES.items()}
UNTYPED = frozenset({"torch.storage.UntypedStorage", "torch.UntypedStorage"})
STORAGE_DTYPES |= dict.fromkeys(UNTYPED)  # each tensor states its own

# Calls that stand for a tensor, and what their arguments are.
STRIDED = frozenset({"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"})
STRIDED_UNTYPED = frozenset({"torch._utils._rebuild_tensor_v3"})
WRAPPED = frozenset(  # the first argument is the tensor
    {
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
    }
)
BY_TYPE = "torch._tensor._rebuild_from_type_v2"  # (call, class, its arguments, state)
PLAIN_TYPES = frozenset(
    {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
)
SIZE, ENCODE = "torch.Size", "_codecs.encode"
TENSOR_NAMES = STRIDED | STRIDED_UNTYPED | WRAPPED | {BY_TYPE, SIZE, ENCODE, "torch.Tensor"}

# Kinds of tensor that are not read, with the words for them; the tensor is left aside.
UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device, without values",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_wrapper_subclass": "of a class without values of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of another device",
    "torch.distributed.tensor.DTensor": "a shard of a DTensor",
    "torch.distributed._tensor.api.DTensor": "a shard of a DTensor",
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor": "a shard of a ShardedTensor",
}
# Types of numbers that are not read, and the bytes of an element in the storages of that type.
_UNSUPPORTED_STORAGES = {
    "complex32": ("ComplexHalfStorage", 4),
    "complex64": ("ComplexFloatStorage", 8),
    "complex128": ("ComplexDoubleStorage", 16),
    "qint8": ("QInt8Storage", 1),
    "quint8": ("QUInt8Storage", 1),
    "qint32": ("QInt32Storage", 4),
    "quint4x2": ("QUInt4x2Storage", 1),
    "quint2x4": ("QUInt2x4Storage", 1),
}
_PACKED = ("float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
_PACKED += tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))
# By the names of their dtype and storage.
UNSUPPORTED_DTYPES = {f"torch.{dtype}": dtype for dtype in (*_UNSUPPORTED_STORAGES, *_PACKED)}
UNSUPPORTED_DTYPES |= {f"torch.{s}": dtype for dtype, (s, _) in _UNSUPPORTED_STORAGES.items()}


def element_size(storage: str) -> int:
    """Bytes of an element in a storage of the type with this name; 1 for untyped ones."""
    sizes = {f"torch.{name}": size for name, size in _UNSUPPORTED_STORAGES.values()}
    if storage in sizes:
        return sizes[storage]
    dtype = STORAGE_DTYPES[storage]
    return 1 if dtype is None else dtype.itemsize


# Values beside the tensors that real training programs save. Left aside, never made.
_HARMLESS = {
    "argparse": ("Namespace",),
    "builtins": (
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
        *("long", "object", "range", "set", "slice", "str", "tuple", "unicode"),
    ),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "copyreg": ("_reconstructor",),  # object.__new__, as protocol 0 and 1 have it
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "easydict": ("EasyDict",),
    "fractions": ("Fraction",),
    "ml_collections.config_dict.config_dict": ("ConfigDict", "FrozenConfigDict", "FieldReference"),
    "numpy": (
        *("bool", "bool_", "dtype", "float16", "float32", "float64", "int16", "int32", "int64"),
        *("int8", "ndarray", "uint16", "uint32", "uint64", "uint8"),
    ),
    "numpy.random": ("RandomState", "Generator"),
    "pathlib": (
        *("Path", "PosixPath", "PurePath", "PurePosixPath"),
        *("PureWindowsPath", "WindowsPath"),
    ),
    "random": ("Random",),
    "torch": ("Generator", "device", "layout", "memory_format"),
    "torch._C": ("Generator",),
    "torch.serialization": ("_get_layout",),
    "torch.torch_version": ("TorchVersion",),
    "types": ("SimpleNamespace",),
    "typing": ("Any", "Dict", "List", "Optional", "Tuple", "Union"),  # of omegaconf's fields
    "uuid": ("UUID",),
    "zoneinfo": ("ZoneInfo",),
}
IN_WORDS = {"torch.torch_version.TorchVersion": "the version of PyTorch"}  # how some are shown
for _core in ("numpy.core", "numpy._core"):
    _HARMLESS[f"{_core}.multiarray"] = ("_reconstruct", "scalar")
    _HARMLESS[f"{_core}.numeric"] = ("_frombuffer",)
    IN_WORDS |= {f"{_core}.multiarray._reconstruct": "an array of NumPy"}
    IN_WORDS |= {f"{_core}.numeric._frombuffer": "an array of NumPy"}
    IN_WORDS |= {f"{_core}.multiarray.scalar": "a number of NumPy"}
_HARMLESS["pathlib._local"] = _HARMLESS["pathlib"]  # Python 3.13
HARMLESS = frozenset(f"{module}.{name}" for module, names in _HARMLESS.items() for name in names)
HARMLESS |= {f"torch.{name}" for name in ("strided", "sparse_coo", "sparse_csr", "sparse_csc")}
HARMLESS |= {
    f"torch.per_{scope}_{kind}"
    for scope in ("tensor", "channel")
    for kind in ("affine", "symmetric", "affine_float_qparams")
}
# Classes, by their capital letter, of frameworks whose checkpoints hold their own objects.
_FRAMEWORKS = re.compile(
    r"(accelerate|bitsandbytes|composer|deepspeed|diffusers|lightning|lightning_fabric"
    r"|lightning_utilities|megatron|mmcv|mmengine|numpy\.dtypes|omegaconf|optimum"
    r"|pytorch_lightning|streaming|torch\.distributed\.\w*tensor|torch\.distributed\._shard"
    r"|torch\.optim|torchao|torchmetrics|transformers|wandb)(\.\w+)*\._*[A-Z]\w*"
    r"|numpy\.random\.(_pickle\.__\w+_ctor|_\w+\.[A-Z]\w*|mtrand\.RandomState)"
)


def check_name(path: Path, name: str) -> None:
    """Raises UserError for a name that stands neither for a tensor nor for a harmless value.

    Args:
      path: the file, for the error.
    """
    if name in TENSOR_NAMES or name in STORAGE_DTYPES or name in DTYPE_OF_NAME:
        return
    if name in HARMLESS or name in UNSUPPORTED or name in UNSUPPORTED_DTYPES:
        return
    if _FRAMEWORKS.fullmatch(name):
        return
    raise UserError(
        f"{visible(path)} is refused: expected tensors only, found that it wants to run code, "
        f"{visible(name, 100)}; save the state dict alone, torch.save(model.state_dict(), FILE)"
    )
