"""AttnType.INTEL_ONEDNN: the attention patterns of oneDNN Graph, one kernel of the matrix engines on GPUs that have them.

oneDNN matches a pattern operation by operation; of a graph that differs, it makes a partition of every operation. So the graphs
here are those of its documentation ("Scaled Dot-Product Attention" and "Grouped Query Attention"), for training. They have one
mask at most: the causal one, which the library makes itself, or an array that is added to the scores. Such an array serves all
other options that hide keys or add to scores, and the causal mask with them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ulysses_dp.kernels.launch import upload
from ulysses_dp.kernels.row_dot import dot_rows

from .._device.arrays import tensor
from .._device.copies import copy_arrays, readable
from .._device.dtypes import held_by
from .._device.workspace import scratch
from . import _onednn
from ._base import Backend
from ._onednn import Compiled, Engine, Graph, Handle, LogicalTensor, dense_strides
from .dense import BY_MASK, Mask, add_up, for_query_heads, is_coarse, mask_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._call.checks import Geometry
    from .._call.options import Options
    from .._ranks.partition import HeadMap

DTYPES = ("float32", "float16", "bfloat16")
COARSE = 2.0**-10  # error of the weights from which on the gradient is refused: for float32, with an lse of 16384
ALIGNMENT = 64  # bytes: GPU kernels read blocks, which must not start between


class IntelOneDnn(Backend):
    """float32, and 16 bits where oneDNN has them on the device; not softcap, sinks, dropout.

    Padding costs a mask of (batch, 1, 1, seq_k); windows, packed sequences, ALiBi and bias cost one of (1 or batch, 1 or heads,
    seq_q, seq_k). A hidden key has to be finite: oneDNN multiplies it by a weight of 0. On CPUs there is no fused kernel: the
    score matrix is in memory, and a causal mask and the gradient are slow.

    Never run on a GPU: there was none. By oneDNN's source there are fused kernels for 16 bits, and for float32 forward with the
    causal mask; and the gradient adds dq up in any order, so that its last bits may change from call to call.
    """

    name = "INTEL_ONEDNN"
    has = BY_MASK

    def check(self, device: Any, geometry: Geometry, options: Options, *, backward: bool, more: Sequence[str] = ()) -> None:
        _onednn.library()
        super().check(device, geometry, options, backward=backward, more=more)
        if geometry.dtype not in DTYPES:
            self.refuse(geometry.dtype)
        if geometry.head_dim_v != geometry.head_dim:
            self.refuse("another head_dim of v")
        if backward and geometry.head_dim == 1:  # the library would end the process
            self.refuse("the gradient for head_dim 1")
        mask = None if options.plain else geometry.dtype if _only_hides(options) else "float32"
        causal, kind = options.causal and mask is None, _onednn.kind_of(device)
        partitions = partitions_of(
            kind, geometry.dtype, geometry.head_dim, geometry.group, causal=causal, mask=mask, backward=backward
        )
        if not is_fused(partitions):
            reason = f"of which oneDNN {_onednn.VERSION} makes {len(partitions)} partitions instead of one it can run"
            self.refuse(f"{geometry.dtype} on {device.name.strip()}, {reason}")

    def forward(self, q: Any, k: Any, v: Any, out: Any, lse: Any, options: Options, heads: HeadMap) -> None:
        if not k.size:
            out[...] = 0
            if lse is not None:
                lse[...] = -np.inf
            return
        seq_k, (batch, seq_q, query_heads, _) = k.shape[1], q.shape
        mask = None if options.plain else mask_of(q, seq_k, options, heads)
        k, v, share = _regular(q, k, v, heads)
        stats = scratch(q.sycl_queue, "oneDNN lse", (batch, query_heads, seq_q), np.dtype(np.float32))
        writes = (out,) if lse is None else (out, _as_rows(stats))
        _run(forward_graph, (q, k, v), writes, mask, share, options)
        if lse is None:
            return
        # of a query that sees no key, the kernels give the result of zeros, but not this lse
        if mask is None:
            lse[...] = stats
            lse[:, :, : max(0, -options.diagonal(seq_q, seq_k))] = -np.inf
        else:
            lse[...] = tensor.where(mask.blind(), -np.inf, stats, order="C")

    def backward(self, arrays: Sequence[Any], grads: Sequence[Any], options: Options, heads: HeadMap) -> None:
        dout, q, k, v, lse, delta = arrays
        if not (q.size and k.size):
            for grad in grads:
                grad[...] = 0
            return
        if is_coarse(lse, COARSE):
            self.refuse(f"the gradient of rows whose lse is beyond {2 * COARSE / np.finfo(lse.dtype).eps:.0f} in size")
        mask = None if options.plain else mask_of(q, k.shape[1], options, heads)
        parts = list(grads)
        if q.shape[2] > k.shape[2]:  # dk and dv of every query head
            shape = (*k.shape[:2], *q.shape[2:])
            parts[1:] = [scratch(q.sycl_queue, f"oneDNN {name} of query heads", shape, k.dtype) for name in ("dk", "dv")]
        k, v, share = _regular(q, k, v, heads)
        # of a query that sees no key, the weights are exp(-inf - 0), and not exp(-inf + inf)
        stats = _as_rows(tensor.where(lse == -np.inf, 0, lse, order="C"))
        _run(backward_graph, (q, k, v, _projection(dout, delta), dout, stats), parts, mask, share, options)
        for part, grad in zip(parts, grads, strict=True):
            if part is not grad:
                add_up(part, grad, heads)


class Spec(NamedTuple):
    """An array of a graph: the arguments of `Graph.array`.

    The axes are (batch, heads, rows, columns); with grouped heads (batch, kv_heads, query heads of each, rows, columns).
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Built = tuple[Graph, list[LogicalTensor], list[LogicalTensor]]  # a graph, its inputs, its outputs


def forward_graph(
    kind: int, q: Spec, k: Spec, v: Spec, out: Spec, lse: Spec | None = None, *, causal: bool, mask: Spec | None
) -> Built:
    """Attention: inputs are q, k, v and those of `_scores`, outputs are out and, if it is wanted, lse."""
    graph, shape = Graph(kind), (*q.shape[:-1], k.shape[-2])
    inputs = query, key, value = [graph.array(*x) for x in (q, k, v)]
    outputs = [graph.array(*x) for x in (out, lse) if x is not None]
    scores, more = _scores(graph, query, key, shape, causal, mask)
    weights = graph.array(q.dtype, shape)
    graph.op("softmax", (scores,), weights, *outputs[1:], axis=-1, mode="inf_as_zero")  # zeros for a query that sees no key
    graph.op("matmul", (weights, value), outputs[0])
    return graph, [*inputs, *more], outputs


def backward_graph(
    kind: int,
    q: Spec,
    k: Spec,
    v: Spec,
    out: Spec,
    dout: Spec,
    lse: Spec,
    dq: Spec,
    dk: Spec,
    dv: Spec,
    *,
    causal: bool,
    mask: Spec | None,
) -> Built:
    """The gradient: inputs are q, k, v, out, dout, lse and those of `_scores`, outputs are dq, dk, dv, of every query head."""
    graph = Graph(kind)
    inputs = query, key, value, result, cotangent, stats = [graph.array(*x) for x in (q, k, v, out, dout, lse)]
    outputs = dquery, dkey, dvalue = [graph.array(*x) for x in (dq, dk, dv)]
    shape = (*q.shape[:-1], k.shape[-2])

    def op(kind: str, *inputs: LogicalTensor, **attributes: Any) -> LogicalTensor:
        return graph.op(kind, inputs, graph.array("float32", shape), **attributes)

    def rounded(x: LogicalTensor) -> LogicalTensor:
        return x if q.dtype == "float32" else graph.op("type_cast", (x,), graph.array(q.dtype, shape))

    scores, more = _scores(graph, query, key, shape, causal, mask)
    weights = op("exp", op("subtract", scores, stats))
    graph.op("matmul", (rounded(weights), cotangent), dvalue, transpose_a=True)
    dweights = op("matmul", cotangent, value, transpose_b=True)
    product = graph.op("multiply", (result, cotangent), graph.array("float32", out.shape))
    delta = graph.op("reduce_sum", (product,), graph.array("float32", lse.shape), axes=(len(shape) - 1,), keep_dims=True)
    dscores = op("multiply", weights, op("subtract", dweights, delta))
    dscores = rounded(op("multiply", dscores, more[0]))
    graph.op("matmul", (dscores, key), dquery)
    graph.op("matmul", (dscores, query), dkey, transpose_a=True)
    return graph, [*inputs, *more], outputs


def _scores(
    graph: Graph, q: LogicalTensor, k: LogicalTensor, shape: tuple[int, ...], causal: bool, mask: Spec | None
) -> tuple[LogicalTensor, list[LogicalTensor]]:
    """The masked scores; and their inputs besides q and k: the scale, then seq_k, seq_q and -inf, or else the mask."""

    def op(kind: str, *inputs: LogicalTensor, dtype: str = "float32", **attributes: Any) -> LogicalTensor:
        return graph.op(kind, inputs, graph.array(dtype, shape), **attributes)

    inputs = [graph.array("float32", (1,))]
    scores = op("multiply", op("matmul", q, k, transpose_b=True), inputs[0])
    if causal:
        inputs += [graph.array(dtype, (1,)) for dtype in ("int32", "int32", "float32")]
        row, column = (op("gen_index", scores, dtype="int32", axis=len(shape) - n) for n in (2, 1))
        last = op("subtract", op("add", row, inputs[1], dtype="int32"), inputs[2], dtype="int32")  # key that the row sees
        scores = op("select", op("greater_equal", last, column, dtype="bool"), scores, inputs[3])
    elif mask is not None:
        inputs.append(graph.array(*mask))
        scores = op("add", scores, inputs[-1])
    return scores, inputs


@lru_cache(maxsize=64)
def partitions_of(
    kind: int,
    dtype: str,
    head_dim: int,
    group: int = 1,
    *,
    causal: bool = False,
    mask: str | None = None,
    backward: bool = False,
) -> list[Handle]:
    """What oneDNN makes of a small problem of this kind, with a mask of this dtype, on this kind of engine. Needs no device."""

    def spec(dtype: str, *shape: int) -> Spec:
        return Spec(dtype, shape, dense_strides(shape))

    of_q, of_k, of_mask = ((1, 2, group), (1, 2, 1), (1, 1, 1)) if group > 1 else ((1, 2), (1, 2), (1, 1))
    q, k, lse = spec(dtype, *of_q, 16, head_dim), spec(dtype, *of_k, 16, head_dim), spec("float32", *of_q, 16, 1)
    added = spec(mask, *of_mask, 16, 16) if mask else None
    if backward:
        graph, *_ = backward_graph(kind, q, k, k, q, q, lse, q, q, q, causal=causal, mask=added)
    else:
        graph, *_ = forward_graph(kind, q, k, k, q, lse, causal=causal, mask=added)
    return graph.partitions()


def is_fused(partitions: Sequence[Handle]) -> bool:
    """Whether there is one partition, and oneDNN can run it."""
    return len(partitions) == 1 and _onednn.is_supported(partitions[0])


@lru_cache(maxsize=64)
def _compiled(
    build: Callable[..., Built], engine: Engine, arrays: tuple[Spec, ...], causal: bool, mask: Spec | None
) -> Compiled:
    graph, inputs, outputs = build(engine.kind, *arrays, causal=causal, mask=mask)
    partitions = graph.partitions()
    if not is_fused(partitions):  # `check` asks for the same, but for a small problem
        raise RuntimeError(f"oneDNN makes {len(partitions)} partitions of attention with {arrays}")
    return Compiled(partitions[0], engine, inputs, outputs)


def _run(
    build: Callable[..., Built],
    reads: Sequence[Any],
    writes: Sequence[Any],
    mask: Mask | None,
    share: int,
    options: Options,
) -> None:
    """Compute with a graph; `share` query heads read a kv head.

    All that the library sees of an array goes through here: it may have any strides, and start anywhere.
    """
    queue, kv_heads, engine = reads[0].sycl_queue, reads[1].shape[2], _onednn.engine_of(reads[0].sycl_queue)
    masks = [] if mask is None else [tensor.permute_dims(mask.added, (0, 2, 1, 3))]
    if masks and engine.kind == _onednn.CPU and held_by(reads[0].dtype) == "bfloat16":
        # oneDNN 3.13.2 is wrong in bfloat16 with AMX if a mask of rows and keys is one for several batches and heads
        masks = [tensor.broadcast_to(x, (reads[0].shape[0], *x.shape[1:])) for x in masks]

    def normal(n: int, x: Any) -> Any:
        fits = _is_normal(_spec(x, kv_heads, share)) and x._pointer % ALIGNMENT == 0
        return x if fits else scratch(queue, f"oneDNN array {n}", x.shape, x.dtype)

    given = [*reads, *masks, *writes]
    arrays = [normal(n, x) for n, x in enumerate(given)]
    count = len(given) - len(writes)
    for x, copy in zip(given[:count], arrays[:count], strict=True):
        if copy is not x:
            copy_arrays((x,), (copy,))
    specs = [_spec(x, kv_heads, share) for x in arrays]
    of_mask = specs.pop(len(reads)) if masks else None
    causal = mask is None and options.causal
    compiled = _compiled(build, engine, tuple(specs), causal, of_mask)
    numbers = _numbers(queue, options.softmax_scale, reads[1].shape[1], reads[0].shape[1])
    pointers = [x._pointer for x in arrays]
    inputs = [*pointers[: len(reads)], *(numbers._pointer + n * ALIGNMENT for n in range(4 if causal else 1))]
    memory = scratch(queue, "oneDNN", (compiled.scratch_bytes,), np.dtype("u1"))
    compiled.run([*inputs, *pointers[len(reads) : count]], pointers[count:], memory._pointer, after=queue)
    for x, copy in zip(writes, arrays[count:], strict=True):
        if copy is not x:
            copy_arrays((copy,), (x,))


def _numbers(queue: Any, scale: float, seq_k: int, seq_q: int) -> Any:
    """Device memory with these numbers and -inf, `ALIGNMENT` bytes apart.

    oneDNN takes numbers from the host, too, but with them has no fast matrix product on CPUs: 200 times slower, measured.
    """
    table = np.zeros((4, ALIGNMENT // 4), np.float32)
    table[:, 0] = scale, 0, 0, -np.inf
    table.view(np.int32)[1:3, 0] = seq_k, seq_q
    return upload(queue, table)


def _spec(x: Any, kv_heads: int, share: int) -> Spec:
    """How a graph sees an array (batch, rows, heads, columns), of which the heads are query heads, kv heads, or one for all.

    The stride of an axis of length 1 is free, but oneDNN 3.13 takes it at its word: here it is as if the axis were longer.
    """
    batch, rows, heads, columns = x.shape
    of_batch, of_row, of_head, of_column = x.strides
    shape, strides = [batch, heads, rows, columns], [of_batch, of_head, of_row, of_column]
    if share > 1:
        each = share if heads > kv_heads else 1
        shape[1:2], strides[1:2] = [heads // each, each], [of_head * each, of_head]
    extent = 1
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1:
            strides[axis] = extent
        extent = max(extent, strides[axis] * shape[axis])
    return Spec(held_by(x.dtype), tuple(shape), tuple(strides))


def _is_normal(spec: Spec) -> bool:
    """Whether oneDNN takes these strides: dense in the last axis, none of them backwards, no element twice."""
    extents = sorted((stride, stride * size) for size, stride in zip(spec.shape, spec.strides, strict=True) if size > 1)
    apart = all(extent <= stride for (_, extent), (stride, _) in pairwise(extents))
    return spec.strides[-1] == 1 and all(stride > 0 for stride in spec.strides) and apart


def _as_rows(x: Any) -> Any:
    """An array (batch, heads, rows) as (batch, rows, heads, 1)."""
    return tensor.permute_dims(x, (0, 2, 1))[..., None]


def _regular(q: Any, k: Any, v: Any, heads: HeadMap) -> tuple[Any, Any, int]:
    """k and v with the same number of query heads for every kv head, and that number.

    Where this rank has but some of the query heads of a kv head, every query head gets its copy; and for a single score, which
    oneDNN 3.13.2 gets wrong on CPUs in the gradient of grouped heads.
    """
    single = q.shape[1] == k.shape[1] == 1
    if not single and heads.uniform(q.shape[2], k.shape[2]):
        return k, v, q.shape[2] // k.shape[2]
    return *for_query_heads(k, v, q, heads), 1


def _projection(dout: Any, delta: Any) -> Any:
    """The component of out along dout, row by row.

    Of out the pattern takes the sum of out * dout alone, of which delta is all that we have. The component along dout has the
    same, and is not longer than out, so that it fits into 16 bits, too.
    """
    queue, delta = dout.sycl_queue, _as_rows(delta)
    (exact,) = readable((dout,), "oneDNN exact dout", delta.dtype, by_head=False)
    size = tensor.max(tensor.abs(exact), axis=-1, keepdims=True)
    size = tensor.where(size > 0, size, 1)
    unit = exact / size  # squares of tiny gradients would be 0
    square = scratch(queue, "oneDNN square", (dout.shape[0], dout.shape[2], dout.shape[1]), delta.dtype)
    dot_rows(unit, unit, square)  # not `tensor.sum`, which adds in any order
    square = _as_rows(square)
    result = unit * (delta / size / tensor.where(square > 0, square, 1))
    if dout.dtype == result.dtype:
        return result
    rounded = scratch(queue, "oneDNN projection", dout.shape, dout.dtype)
    copy_arrays((result,), (rounded,))
    return rounded


def _only_hides(options: Options) -> bool:
    """Whether the numbers of the mask are all 0 or -inf, which 16 bits hold."""
    return options.alibi_slopes is None and options.bias is None
