"""The part of the C interface of oneDNN that attention needs: graphs of operations, their compilation, their execution.

oneDNN Graph fuses. One says what is to be computed, as a graph of operations; the library cuts the graph into partitions, each
of which is one kernel where it has one, and compiles a partition for a device and for the shapes and strides of its arrays:

    graph = Graph(kind_of(device))
    scores = graph.op("matmul", (q, k), graph.array("float32", shape), transpose_b=True)   # q and k from graph.array, too
    (partition,) = graph.partitions()
    compiled = Compiled(partition, engine_of(queue), (q, k), (scores,))
    compiled.run(addresses[:2], addresses[2:], scratchpad, after=queue)

It computes in the caller's USM memory, without copies. The library has to be built for the SYCL runtime that dpctl has loaded:
two of them in one process cannot share a context, which is found out here before the library is loaded. The numbers of the
enumerations are those of the headers of the version below.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import re
import weakref
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpctl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VERSION = "3.13"  # of the library
INSTALL = "pip install 'onednn==2026.1.*'"  # the wheel that holds it, for libsycl.so.9 of dpctl 0.22

# What the library needs besides the SYCL runtime; wheels put it beside the library, where the linker does not look.
DEPENDENCIES = ("libintlc.so.5", "libimf.so", "libsvml.so", "libtbb.so.12")

MAX_AXES = 12
STATUS = (
    *("success", "out_of_memory", "invalid_arguments", "unimplemented", "last_impl_reached", "runtime_error"),
    *("not_required", "invalid_graph", "invalid_graph_op", "invalid_shape", "invalid_data_type"),
)
CPU, GPU = 1, 2  # dnnl_engine_kind_t
DTYPES = {"float16": 1, "bfloat16": 2, "float32": 3, "int32": 4, "bool": 8}  # dnnl_data_type_t
OPS = {  # dnnl_graph_op_kind_t
    **{"add": 2, "exp": 26, "gen_index": 84, "greater_equal": 85, "matmul": 39, "multiply": 46, "reduce_sum": 57},
    **{"select": 81, "softmax": 64, "subtract": 74, "type_cast": 77},
}
ATTRIBUTES = {"axis": 0x30, "axes": 0x40, "keep_dims": 0x61, "transpose_a": 0x65, "transpose_b": 0x66, "mode": 0x84}
PROPERTY, FUSION = 0, 1  # of dnnl_graph_tensor_property_t: undefined; of dnnl_graph_partition_policy_t


class _Version(ctypes.Structure):
    _fields_ = (("major", c_int), ("minor", c_int))  # and more


_DIMS = c_int64 * MAX_AXES


class LogicalTensor(ctypes.Structure):
    """dnnl_graph_logical_tensor_t: what is known of an array of a graph, all but where it is."""

    _fields_ = (
        *(("id", c_size_t), ("ndims", c_int), ("dims", _DIMS), ("data_type", c_int)),
        *(("property", c_int), ("layout_type", c_int), ("strides", _DIMS)),
    )


# The handles of the library are pointers; where one is created, its address comes first.
_OUT, _HANDLE, _TENSOR = POINTER(c_void_p), c_void_p, POINTER(LogicalTensor)
_LIST, _TEXT, _DEVICE, _QUEUE = POINTER(c_void_p), c_char_p, c_void_p, c_void_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "dnnl_sycl_interop_engine_create": (_OUT, _DEVICE, c_void_p),
    "dnnl_engine_destroy": (_HANDLE,),
    "dnnl_sycl_interop_stream_create": (_OUT, _HANDLE, _QUEUE),
    "dnnl_stream_wait": (_HANDLE,),
    "dnnl_stream_destroy": (_HANDLE,),
    "dnnl_graph_logical_tensor_init_with_strides": (_TENSOR, c_size_t, c_int, c_int32, _DIMS, _DIMS, c_int),
    "dnnl_graph_op_create": (_OUT, c_size_t, c_int, _TEXT),
    "dnnl_graph_op_add_input": (_HANDLE, _TENSOR),
    "dnnl_graph_op_add_output": (_HANDLE, _TENSOR),
    "dnnl_graph_op_set_attr_bool": (_HANDLE, c_int, POINTER(c_uint8), c_size_t),
    "dnnl_graph_op_set_attr_s64": (_HANDLE, c_int, POINTER(c_int64), c_size_t),
    "dnnl_graph_op_set_attr_str": (_HANDLE, c_int, _TEXT, c_size_t),
    "dnnl_graph_op_destroy": (_HANDLE,),
    "dnnl_graph_graph_create": (_OUT, c_int),
    "dnnl_graph_add_op": (_HANDLE, _HANDLE),
    "dnnl_graph_graph_finalize": (_HANDLE,),
    "dnnl_graph_graph_filter": (_HANDLE, c_int),
    "dnnl_graph_graph_get_partition_num": (_HANDLE, POINTER(c_size_t)),
    "dnnl_graph_graph_get_partitions": (_HANDLE, c_size_t, _LIST),
    "dnnl_graph_graph_destroy": (_HANDLE,),
    "dnnl_graph_partition_is_supported": (_HANDLE, POINTER(c_uint8)),
    "dnnl_graph_partition_compile": (_HANDLE, _HANDLE, c_size_t, POINTER(_TENSOR), c_size_t, POINTER(_TENSOR), _HANDLE),
    "dnnl_graph_partition_destroy": (_HANDLE,),
    "dnnl_graph_set_compiled_partition_cache_capacity": (c_int,),
    "dnnl_graph_compiled_partition_create": (_OUT, _HANDLE),
    "dnnl_graph_compiled_partition_get_scratchpad_logical_tensor": (_HANDLE, _TENSOR),
    "dnnl_graph_compiled_partition_destroy": (_HANDLE,),
    "dnnl_graph_tensor_create": (_OUT, _TENSOR, _HANDLE, c_void_p),
    "dnnl_graph_tensor_destroy": (_HANDLE,),
    "dnnl_graph_sycl_interop_compiled_partition_execute_v2": (
        *(_HANDLE, _HANDLE, c_size_t, _LIST, c_size_t, _LIST, _HANDLE),
        *(c_void_p, c_void_p),  # events to wait for, the event of the execution
    ),
}


def library_path() -> Path:
    """Where the wheel ``onednn`` put the library."""
    try:
        files = importlib.metadata.files("onednn") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        path = Path(str(file.locate()))
        if path.name == "libdnnl.so.3" and path.exists():
            return path
    raise ImportError(f"attn_type INTEL_ONEDNN needs the oneDNN library: {INSTALL}")


def sycl_version(library: Path) -> int | None:
    """The number N of the libsycl.so.N for which a shared library is built, or None. The library is not loaded."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"libsycl\.so\.(\d+)\0", content)
        return int(found[1]) if found else None


@cache
def library() -> ctypes.CDLL:
    """The library, loaded once.

    Raises
    ------
    ImportError
        It is not installed, or another version than that of the numbers here, or built for another SYCL runtime than dpctl.
    """
    path = library_path()
    interface = next(file for file in Path(dpctl.__file__).parent.iterdir() if "libDPCTLSyclInterface.so" in file.name)
    ours, theirs = sycl_version(interface), sycl_version(path)
    if ours != theirs:
        raise ImportError(
            f"attn_type INTEL_ONEDNN: {path} is built for {_runtime(theirs)}, dpctl {dpctl.__version__} for {_runtime(ours)}; "
            f"{INSTALL} with dpctl>=0.22"
        )
    try:
        for name in DEPENDENCIES:
            if (path.parent / name).exists():
                ctypes.CDLL(str(path.parent / name))
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"attn_type INTEL_ONEDNN: {error}; {INSTALL} brings what is needed") from error
    loaded.dnnl_version.restype = POINTER(_Version)
    version = loaded.dnnl_version().contents
    found = f"{version.major}.{version.minor}"
    if found != VERSION:
        raise ImportError(f"attn_type INTEL_ONEDNN needs oneDNN {VERSION}, not {found}: {INSTALL}")
    for name, arguments in _PROTOTYPES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int
    # it would keep 1024 partitions besides those that we keep: 1.5 GB for as many shapes
    forget = "dnnl_graph_set_compiled_partition_cache_capacity"
    check(forget, getattr(loaded, forget)(0))
    return loaded


def _runtime(version: int | None) -> str:
    return "no SYCL runtime" if version is None else f"libsycl.so.{version}"


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library.

    Raises
    ------
    NotImplementedError
        oneDNN has no implementation for this device.
    RuntimeError
        Any other failure, by the name of the function and what it returned.
    """
    check(name, getattr(library(), name)(*arguments))


def check(name: str, status: int) -> None:
    """Raise what a status of a function stands for."""
    if status:
        reason = STATUS[status] if status < len(STATUS) else status
        raise (NotImplementedError if reason == "unimplemented" else RuntimeError)(f"oneDNN: {name} returned {reason}")


class Handle:
    """Owns what a function of the library created, and destroys it when it is no longer referred to."""

    def __init__(self, value: c_void_p, destroy: str) -> None:
        self.value = value.value
        self._as_parameter_ = value  # what ctypes passes for this object
        # nothing is destroyed at exit, when the SYCL runtime may be gone
        weakref.finalize(self, getattr(library(), destroy), value).atexit = False

    @classmethod
    def create(cls, create: str, destroy: str, *arguments: Any) -> Handle:
        value = c_void_p()
        call(create, byref(value), *arguments)
        return cls(value, destroy)


class Graph:
    """A graph of operations for one kind of engine, `CPU` or `GPU`. Needs no device."""

    def __init__(self, kind: int) -> None:
        self._handle = Handle.create("dnnl_graph_graph_create", "dnnl_graph_graph_destroy", kind)
        self._tensors = self._ops = 0

    def array(self, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None) -> LogicalTensor:
        """An array of the graph; C-contiguous by default. Strides are in elements."""
        if strides is None:
            strides = dense_strides(shape)
        self._tensors += 1
        tensor, dims, steps = LogicalTensor(), _DIMS(*shape), _DIMS(*strides)
        arguments = self._tensors, DTYPES[dtype], len(shape), dims, steps, PROPERTY
        call("dnnl_graph_logical_tensor_init_with_strides", tensor, *arguments)
        return tensor

    def op(self, kind: str, inputs: Iterable[LogicalTensor], *outputs: LogicalTensor, **attributes: Any) -> LogicalTensor:
        """Add an operation; returns its first output."""
        self._ops += 1
        create, destroy = "dnnl_graph_op_create", "dnnl_graph_op_destroy"
        op = Handle.create(create, destroy, self._ops, OPS[kind], f"{kind}_{self._ops}".encode())
        for tensor in inputs:
            call("dnnl_graph_op_add_input", op, tensor)
        for tensor in outputs:
            call("dnnl_graph_op_add_output", op, tensor)
        for name, value in attributes.items():
            if isinstance(value, bool):
                call("dnnl_graph_op_set_attr_bool", op, ATTRIBUTES[name], c_uint8(value), 1)
            elif isinstance(value, str):
                call("dnnl_graph_op_set_attr_str", op, ATTRIBUTES[name], value.encode(), len(value))
            else:
                numbers = value if isinstance(value, tuple) else (value,)
                call("dnnl_graph_op_set_attr_s64", op, ATTRIBUTES[name], (c_int64 * len(numbers))(*numbers), len(numbers))
        call("dnnl_graph_add_op", self._handle, op)  # which copies it
        return outputs[0]

    def partitions(self) -> list[Handle]:
        """Cut the complete graph into partitions; see `is_supported`."""
        call("dnnl_graph_graph_finalize", self._handle)
        call("dnnl_graph_graph_filter", self._handle, FUSION)
        count = c_size_t()
        call("dnnl_graph_graph_get_partition_num", self._handle, count)
        values = (c_void_p * count.value)()
        call("dnnl_graph_graph_get_partitions", self._handle, count, values)
        return [Handle(c_void_p(value), "dnnl_graph_partition_destroy") for value in values]


def is_supported(partition: Handle) -> bool:
    """Whether oneDNN has code for a partition."""
    supported = c_uint8()
    call("dnnl_graph_partition_is_supported", partition, supported)
    return bool(supported)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a C-contiguous array, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


class Engine:
    """A device in a context, as oneDNN sees it, and an in-order queue of its own.

    On an out-of-order queue oneDNN 3.13.2 can lose track of what depends on what within a partition: with a causal mask whose
    lengths were scalars from the host, 18 to 98 of 100 results were wrong; on an in-order queue none.
    """

    def __init__(self, device: Any, context: Any) -> None:
        self.kind = kind_of(device)
        queue = dpctl.SyclQueue(context, device, property="in_order")
        create, destroy = "dnnl_sycl_interop_engine_create", "dnnl_engine_destroy"
        self.handle = Handle.create(create, destroy, device.addressof_ref(), context.addressof_ref())
        create, destroy = "dnnl_sycl_interop_stream_create", "dnnl_stream_destroy"
        self.stream = Handle.create(create, destroy, self.handle, queue.addressof_ref())


def kind_of(device: Any) -> int:
    """The kind of engine that serves a device."""
    return CPU if device.is_cpu else GPU


@lru_cache(maxsize=16)
def _engine(device: Any, context: Any) -> Engine:
    return Engine(device, context)


@lru_cache(maxsize=16)
def engine_of(queue: Any) -> Engine:
    """The engine for the memory of a queue; queues of one device and context share it, and what is compiled for it."""
    return _engine(queue.sycl_device, queue.sycl_context)


class Compiled:
    """A partition, compiled for an engine and the shapes and strides of its arrays.

    Parameters
    ----------
    partition : Handle
        What `Graph.partitions` returned.
    engine : Engine
        Of the kind of the graph.
    inputs, outputs : sequence of LogicalTensor
        All the arrays that enter or leave the partition, in the order in which `run` will get them.
    """

    def __init__(
        self, partition: Handle, engine: Engine, inputs: Sequence[LogicalTensor], outputs: Sequence[LogicalTensor]
    ) -> None:
        create, destroy = "dnnl_graph_compiled_partition_create", "dnnl_graph_compiled_partition_destroy"
        self._handle = Handle.create(create, destroy, partition)
        self._engine, self._inputs, self._outputs, self._scratchpad = engine, inputs, outputs, LogicalTensor()
        tensors = [(len(x), (_TENSOR * len(x))(*map(ctypes.pointer, x))) for x in (inputs, outputs)]
        call("dnnl_graph_partition_compile", partition, self._handle, *tensors[0], *tensors[1], engine.handle)
        call("dnnl_graph_compiled_partition_get_scratchpad_logical_tensor", self._handle, self._scratchpad)
        self.scratch_bytes = self._scratchpad.dims[0]

    def run(self, inputs: Sequence[int], outputs: Sequence[int], scratchpad: int, *, after: Any) -> None:
        """Execute after all work of a queue, and wait.

        Parameters
        ----------
        inputs, outputs : sequence of int
            The USM addresses of the arrays.
        scratchpad : int
            USM address of `scratch_bytes` bytes.
        after : dpctl.SyclQueue
            The queue on which the inputs are computed.
        """
        ins = [self._bind(*pair) for pair in zip(self._inputs, inputs, strict=True)]
        outs = [self._bind(*pair) for pair in zip(self._outputs, outputs, strict=True)]
        scratch = self._bind(self._scratchpad, scratchpad) if self.scratch_bytes else None
        after.wait()
        execute, stream = "dnnl_graph_sycl_interop_compiled_partition_execute_v2", self._engine.stream
        call(execute, self._handle, stream, *_list(ins), *_list(outs), scratch, None, None)
        call("dnnl_stream_wait", stream)  # also what keeps the handles alive for as long as they are needed

    def _bind(self, tensor: LogicalTensor, address: int) -> Handle:
        create, destroy = "dnnl_graph_tensor_create", "dnnl_graph_tensor_destroy"
        return Handle.create(create, destroy, tensor, self._engine.handle, address)


def _list(handles: Sequence[Handle]) -> tuple[int, Any]:
    return len(handles), (c_void_p * len(handles))(*(x.value for x in handles))
