"""A tensor over memory that torch did not allocate, handed over as a DLPack capsule."""

import ctypes

import torch
from torch import Tensor

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_TYPE_CODES = {torch.float32: 2, torch.float64: 2, torch.float16: 2, torch.bfloat16: 4}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


# torch looks into a structure once more when the last tensor over it goes, whenever that is; they are small
_kept: list[_Managed] = []


def tensor_at(address: int, count: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one dimension over memory at an address. The memory is never freed by it, nor looked at.

    Args:
        address: Where it begins.
        count: Elements.
        dtype: A floating-point type.
        device: Where the memory is; of CUDA with an index.
    """
    managed = _Managed()
    managed.tensor.data = address
    managed.tensor.device = _Device(_DEVICE_TYPES[device.type], device.index or 0)
    managed.tensor.ndim = 1
    managed.tensor.dtype = _DataType(_TYPE_CODES[dtype], 8 * dtype.itemsize, 1)
    managed.tensor.shape = (ctypes.c_int64 * 1)(count)
    _kept.append(managed)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return torch.from_dlpack(new_capsule(ctypes.addressof(managed), b"dltensor", None))
