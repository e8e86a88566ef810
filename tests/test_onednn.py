"""AttnType.INTEL_ONEDNN against the oracle; what oneDNN makes of its graphs for GPUs; what it has not; where it is missing."""

import importlib.metadata
import re
import threading
from ctypes import byref, c_void_p
from pathlib import Path

import dpnp
import numpy as np
import oracle
import pytest
from checks import FORMS, check, check_gradient, decode, encode, packed, some_options
from gradients import dense_gradient
from helpers import KINDS, LAYOUTS, as_kind, as_numpy, outcomes, part, random_qkv, split
from test_varlen import LENGTHS
from ulysses_dp.kernels import reference

from ulysses_dp import AttnType, attention, attention_backward, ulysses_attention
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue
from ulysses_dp._local import check_attention
from ulysses_dp._ranks.partition import HeadMap
from ulysses_dp.backends import _onednn, intel_onednn

ONEDNN = AttnType.INTEL_ONEDNN
HAS = ("causal", "window", "alibi", "alibi of batch", "bias", "mask")
COMBINATIONS = [("causal", "mask"), ("window", "alibi"), ("causal", "window", "alibi", "bias", "mask")]
FEATURES = [{}, {"causal": True}, {"mask": "float32"}, {"mask": "of q"}]


def obstacle():
    try:
        _onednn.library()
    except ImportError as error:
        return str(error)
    return None


needs_library = pytest.mark.skipif(obstacle() is not None, reason=f"{obstacle()}")


def runs(form, head_dim=16):
    """Whether the device of this test has a form of numbers."""
    dtype = {"bits": "bfloat16"}.get(form, form)
    kind = _onednn.kind_of(default_queue().sycl_device)
    return dtype != "float64" and intel_onednn.is_fused(intel_onednn.partitions_of(kind, dtype, head_dim, backward=True))


@pytest.fixture
def form(request):
    if not runs(request.param):
        pytest.skip(f"oneDNN has no {request.param} on this device")
    return request.param


def compare(comm, functions, whole, **options):
    """Forward and backward against the oracle."""
    check(comm, whole, functions=functions, attn_type=ONEDNN, **options)
    check_gradient(comm, whole, functions=functions, attn_type=ONEDNN, **options)


@needs_library
@pytest.mark.parametrize("form", ["float32", "float16", "bits"], indirect=True)
@pytest.mark.parametrize("names", [(), *((name,) for name in HAS), *COMBINATIONS], ids=" ".join)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1), (10, 5)])  # the last two are cut between ranks
def test_options(comm, functions, form, names, heads, kv_heads):
    for seq, seq_k in ((19, 19), (13, 22), (22, 13)):  # with causal, the last leaves 9 queries without a key
        whole = random_qkv(seq, 2, seq, heads, kv_heads, 16, seq_k=seq_k)
        compare(comm, functions, whole, form=form, **some_options(names, 2, heads, seq, seq_k))


@needs_library
@pytest.mark.parametrize(
    ("seq", "seq_k"), [(1, 1), (1, 7), (7, 1), (2, 2), (31, 37), (64, 64), (127, 1), (0, 5), (5, 0), (0, 0)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (2, 1)])
def test_lengths(comm, functions, seq, seq_k, heads, kv_heads):
    for causal in (False, True):
        compare(comm, functions, random_qkv(1, 2, seq, heads, kv_heads, 8, seq_k=seq_k), causal=causal)


@needs_library
@pytest.mark.parametrize("head_dim", [2, 5, 64, 80, 128, 256])
@pytest.mark.parametrize("softmax_scale", [None, 0, -0.3])
def test_head_dims_and_scales(comm, functions, head_dim, softmax_scale):
    compare(comm, functions, random_qkv(2, 1, 12, 2, 2, head_dim), softmax_scale=softmax_scale)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd"])
def test_layouts(comm, functions, kind, strides, layout):
    compare(comm, functions, random_qkv(5, 2, 12, 4, 2, 16), kind=kind, strides=strides, layout=layout, causal=True)


@needs_library
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("names", [(), ("causal",), ("window", "alibi", "mask")], ids=" ".join)
def test_packed_sequences(comm, functions, lengths, names):
    whole, packing = packed(lengths)
    compare(comm, functions, whole, **packing, **some_options(names, 1, 4, *map(sum, lengths)))


@needs_library
def test_bias_that_is_broadcast(comm, functions):
    rng = np.random.default_rng(3)
    for shape in ((1, 1, 1, 17), (1, 4, 1, 17), (2, 1, 13, 1), (1, 1, 13, 17)):
        bias = rng.standard_normal(shape).astype(np.float32)
        bias[..., -1] = -np.inf  # with one column, it hides all keys from the last query
        compare(comm, functions, random_qkv(3, 2, 13, 4, 2, 8, seq_k=17), bias=bias)


def options_of(causal, heads=12):
    """Checked options of a call with this many heads."""
    x = np.zeros((1, 1, heads, 8), np.float32)
    none = {"softmax_scale": None, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None}
    return check_attention(x, x, x, layout="bshd", causal=causal, return_lse=True, attn_type=ONEDNN, **none)[2]


# heads of this rank, its kv heads, and how they belong together: whole groups, groups cut in front, behind, on both sides
SHARES = [
    (6, 2, HeadMap(3)),
    (5, 2, HeadMap(3, 1)),
    (4, 2, HeadMap(3)),
    (4, 3, HeadMap(2, 1)),
    (2, 1, HeadMap(4, 1)),
    (2, 2, HeadMap(2, 1)),
]


@needs_library
@pytest.mark.single
@pytest.mark.parametrize(("query_heads", "kv_heads", "heads"), SHARES)
@pytest.mark.parametrize("head_dim", [5, 8, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_views_of_an_exchange_buffer(query_heads, kv_heads, heads, head_dim, causal):
    """As `ulysses_attention` passes them: rows outermost, and q, k and v side by side."""
    batch, seq, rng = 2, 11, np.random.default_rng(4)
    parts = query_heads, kv_heads, kv_heads, query_heads  # of q, k, v, dout
    buffer = tensor.asarray(rng.standard_normal((seq, batch, sum(parts), head_dim), dtype=np.float32))
    gradients, lse = tensor.zeros_like(buffer), tensor.empty((batch, seq, query_heads), dtype="f4")

    def views(buffer):
        ends = np.cumsum([0, *parts])
        return [tensor.permute_dims(buffer[:, :, ends[n] : ends[n + 1]], (1, 0, 2, 3)) for n in range(4)]

    q, k, v, dout = views(buffer)
    dq, dk, dv, out = views(gradients)
    lse = tensor.permute_dims(lse, (0, 2, 1))
    options, backend = options_of(causal), intel_onednn.IntelOneDnn()
    backend.forward(q, k, v, out, lse, options, heads)
    how = {"scale": 8**-0.5, "diagonal": 0 if causal else seq, "group": heads.group, "head_shift": heads.shift}
    dense = [tensor.asnumpy(x) for x in (q, k, v, dout)]
    expected_out, expected_lse = reference.forward(*dense[:3], **how)
    np.testing.assert_allclose(tensor.asnumpy(out), expected_out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(tensor.asnumpy(lse), expected_lse, rtol=0, atol=1e-5)

    delta = tensor.empty(lse.shape, dtype="f4")
    backend.delta(dout, out, delta)
    backend.backward((dout, q, k, v, lse, delta), (dq, dk, dv), options, heads)
    numbers = dense[3], *dense[:3], expected_lse, tensor.asnumpy(delta)
    for gradient, expected in zip((dq, dk, dv), reference.backward(*numbers, **how), strict=True):
        np.testing.assert_allclose(tensor.asnumpy(gradient), expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    result = tensor.zeros_like(out)
    backend.forward(q, k, v, result, None, options, heads)  # nobody wants lse
    np.testing.assert_allclose(tensor.asnumpy(result), expected_out, rtol=0, atol=1e-5)


@needs_library
@pytest.mark.single
def test_nothing_is_copied(monkeypatch):
    """Neither contiguous arrays nor whole groups of heads in an exchange buffer."""
    monkeypatch.setattr(intel_onednn, "copy_arrays", None)
    monkeypatch.setattr(intel_onednn.tensor, "take", None)
    buffer = tensor.asarray(np.random.default_rng(5).standard_normal((9, 2, 8, 16), dtype=np.float32))
    q, k, v = (tensor.permute_dims(buffer[:, :, heads], (1, 0, 2, 3)) for heads in (slice(4), slice(4, 6), slice(6, 8)))
    out = attention(q, k, v, causal=True, attn_type=ONEDNN)
    expected, _ = oracle.dense_attention(*map(tensor.asnumpy, (q, k, v)), causal=True)
    np.testing.assert_allclose(tensor.asnumpy(out), expected, rtol=0, atol=1e-5)


@needs_library
@pytest.mark.single
def test_gradients_of_any_size():
    """The gradient gets the sums of out * dout by a detour, through squares of dout."""
    q, k, v = random_qkv(6, 1, 9, 2, 2, 8)
    out, lse = (x.astype(np.float32) for x in oracle.dense_attention(q, k, v))
    dout = np.random.default_rng(6).standard_normal(q.shape).astype(np.float32)
    dout[:, 3] = 0
    expected = dense_gradient(dout, q, k, v)[:3]
    for size in (np.float32(1e-30), np.float32(1), np.float32(1e25)):
        for gradient, wanted in zip(
            attention_backward(size * dout, q, k, v, out, lse, attn_type=ONEDNN), expected, strict=True
        ):
            np.testing.assert_allclose(gradient / size, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@needs_library
@pytest.mark.single
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (5, 5)}], ids=str)
def test_repeated_calls_among_other_work(options):
    """Each call gets what the queue has just computed, and its result goes on at once. Without waiting, 1 in 10 was wrong."""
    whole = random_qkv(7, 1, 48, 4, 2, 16)
    q, k, v = (as_kind(x, "dpnp") for x in whole)
    dout, first = q + 1, None
    for turn in range(200):
        scaled = [dpnp.multiply(dpnp.multiply(x, 2 + turn), 1 / (2 + turn)) for x in (q, k, v)]
        exact = [dpnp.where(abs(x - y) < 1, y, x) for x, y in zip(scaled, (q, k, v), strict=True)]
        out, lse = attention(*exact, return_lse=True, attn_type=ONEDNN, **options)
        results = out, lse, *attention_backward(dout, *exact, out, lse, attn_type=ONEDNN, **options)
        results = [as_numpy(dpnp.add(x, 0)) for x in results]
        first = first or results
        for result, same in zip(results, first, strict=True):
            np.testing.assert_array_equal(result, same)
    np.testing.assert_allclose(first[0], oracle.dense_attention(*whole, **options)[0], rtol=0, atol=1e-5)


@needs_library
@pytest.mark.single
def test_executions_are_waited_for(monkeypatch):
    names, call = [], _onednn.call
    monkeypatch.setattr(_onednn, "call", lambda name, *arguments: (names.append(name), call(name, *arguments)))
    q, k, v = random_qkv(7, 1, 8, 2, 2, 8)
    attention_backward(q, q, k, v, *attention(q, k, v, return_lse=True, attn_type=ONEDNN), attn_type=ONEDNN)
    executions = [n for n, name in enumerate(names) if "execute" in name]
    assert [names[n + 1] for n in executions] == 2 * ["dnnl_stream_wait"]


@needs_library
@pytest.mark.single
def test_threads():
    """They share what is compiled, and the queue of the engine."""
    problems = [random_qkv(n, 1, 16, 2, 2, 16) for n in range(4)]
    wrong = []

    def work(problem):
        expected, _ = oracle.dense_attention(*problem, causal=True)
        for _ in range(30):
            if not np.allclose(attention(*problem, causal=True, attn_type=ONEDNN), expected, rtol=0, atol=1e-5):
                wrong.append(problem)

    threads = [threading.Thread(target=work, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_library
@pytest.mark.single
def test_compiled_once():
    q, k, v = random_qkv(8, 1, 21, 2, 2, 8)
    attention(q, k, v, attn_type=ONEDNN)
    before = intel_onednn._compiled.cache_info()
    for scale in (0.5, 2.0):  # a number, not a part of the code
        attention(q, k, v, softmax_scale=scale, attn_type=ONEDNN)
    after = intel_onednn._compiled.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 2)
    assert after.maxsize is not None


@needs_library
@pytest.mark.single
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_partition_for_gpus(dtype, backward, features, group, head_dim):
    """What the matrix engines need, and can be asked without a GPU: all operations in one partition that oneDNN can run."""
    features = {name: dtype if value == "of q" else value for name, value in features.items()}
    partitions = intel_onednn.partitions_of(_onednn.GPU, dtype, head_dim, group, backward=backward, **features)
    assert [_onednn.is_supported(x) for x in partitions] == [True]


@needs_library
@pytest.mark.single
def test_other_graphs_are_cut():
    """So that the test above can fail: the scale after the mask is no pattern of oneDNN."""
    graph, shape = _onednn.Graph(_onednn.GPU), (1, 2, 16, 16)
    arrays = [graph.array("float16", (1, 2, 16, 64)) for _ in range(4)]
    scores, mask, scale = graph.array("float32", shape), graph.array("float32", shape), graph.array("float32", (1,))
    graph.op("matmul", arrays[:2], scores, transpose_b=True)
    masked = graph.op("add", (scores, mask), graph.array("float32", shape))
    scaled = graph.op("multiply", (masked, scale), graph.array("float32", shape))
    weights = graph.op("softmax", (scaled,), graph.array("float16", shape), axis=3)
    graph.op("matmul", (weights, arrays[2]), arrays[3])
    assert not intel_onednn.is_fused(graph.partitions())


REFUSED = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": np.zeros(2)},
    "dropout_p": {"dropout_p": 0.1, "seed": 1},
}


@needs_library
@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(comm, name):
    """On all ranks alike, before anything is sent."""
    rows = split(8, comm.size)
    arrays = [part(x, rows, comm.rank) for x in random_qkv(9, 1, 8, 2, 2, 8)]
    results = outcomes(comm, lambda: ulysses_attention(*arrays, comm=comm, attn_type=ONEDNN, **REFUSED[name]))
    ((error, message),) = set(results)
    assert error is NotImplementedError
    assert f"attn_type INTEL_ONEDNN does not support {name}; INTEL_SYCL does" in message


@needs_library
@pytest.mark.single
@pytest.mark.parametrize("form", FORMS)
def test_dtypes_run_or_are_refused(form):
    q, k, v = (encode(x, form) for x in random_qkv(10, 1, 8, 2, 2, 16))
    dtype = {"dtype": "bfloat16"} if form == "bits" else {}
    if runs(form):
        out = attention(q, k, v, attn_type=ONEDNN, **dtype)
        expected, _ = oracle.dense_attention(*map(decode, (q, k, v)))
        np.testing.assert_allclose(decode(out), expected, rtol=0, atol=oracle.TOLERANCE["bfloat16"])
    else:
        name = "bfloat16" if form == "bits" else form
        with pytest.raises(NotImplementedError, match=rf"INTEL_ONEDNN does not support {name}.*; INTEL_SYCL does"):
            attention(q, k, v, attn_type=ONEDNN, **dtype)


@needs_library
@pytest.mark.single
def test_refused_dtype_says_why(monkeypatch):
    monkeypatch.setattr(intel_onednn, "partitions_of", lambda *arguments, **features: [None] * 4)
    with pytest.raises(NotImplementedError, match=r"float32 on .+, of which oneDNN 3\.13 makes 4 partitions instead of one"):
        attention(*random_qkv(11, 1, 8, 2, 2, 16), attn_type=ONEDNN)


@needs_library
@pytest.mark.single
def test_head_dim_1():
    """oneDNN would end the process."""
    q, k, v = random_qkv(12, 1, 8, 2, 2, 1)
    out, lse = attention(q, k, v, return_lse=True, attn_type=ONEDNN)
    np.testing.assert_allclose(out, oracle.dense_attention(q, k, v)[0], rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="the gradient for head_dim 1; INTEL_SYCL does"):
        attention_backward(out, q, k, v, out, lse, attn_type=ONEDNN)


@pytest.fixture
def fresh_library():
    """The library is looked for again, in the test and after it."""
    _onednn.library.cache_clear()
    yield
    _onednn.library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_not_installed(comm, monkeypatch):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)
    q, k, v = random_qkv(13, 1, 8, 2, 2, 8)
    with pytest.raises(ImportError, match=r"INTEL_ONEDNN needs the oneDNN library: pip install 'onednn==2026\.1\.\*'"):
        attention(q, k, v, attn_type=ONEDNN)
    ((error, _),) = set(outcomes(comm, lambda: ulysses_attention(q, k, v, comm=comm, attn_type=ONEDNN)))
    assert error is ImportError


@pytest.mark.single
@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize(
    ("content", "runtime"), [(b"\0libsycl.so.7\0", r"libsycl\.so\.7"), (b"\0libgomp.so.1\0", "no SYCL runtime")]
)
def test_other_sycl_runtime(monkeypatch, tmp_path, content, runtime):
    """Found out before it is loaded."""
    library = tmp_path / "libdnnl.so.3"
    library.write_bytes(content)
    monkeypatch.setattr(_onednn, "library_path", lambda: library)
    with pytest.raises(
        ImportError, match=rf"is built for {runtime}, dpctl .+ for libsycl\.so\.\d+; pip install .* with dpctl>="
    ):
        attention(*random_qkv(13, 1, 8, 2, 2, 8), attn_type=ONEDNN)


@needs_library
@pytest.mark.single
@pytest.mark.usefixtures("fresh_library")
def test_other_version(monkeypatch):
    monkeypatch.setattr(_onednn, "VERSION", "3.7")
    with pytest.raises(ImportError, match=r"needs oneDNN 3\.7, not 3\.13: pip install"):
        _onednn.library()


@needs_library
@pytest.mark.single
@pytest.mark.usefixtures("fresh_library")
def test_broken_library(monkeypatch, tmp_path):
    library = tmp_path / "libdnnl.so.3"
    library.write_bytes(b"\0libsycl.so.%d\0" % _onednn.sycl_version(_onednn.library_path()))
    monkeypatch.setattr(_onednn, "library_path", lambda: library)
    with pytest.raises(ImportError, match=r"libdnnl\.so\.3.*; pip install"):
        _onednn.library()


@needs_library
@pytest.mark.single
def test_errors_name_the_function():
    with pytest.raises(RuntimeError, match="dnnl_graph_tensor_create returned invalid_arguments"):
        _onednn.call("dnnl_graph_tensor_create", byref(c_void_p()), _onednn.LogicalTensor(), None, None)
    with pytest.raises(NotImplementedError, match="dnnl_graph_op_destroy returned unimplemented"):
        _onednn.check("dnnl_graph_op_destroy", _onednn.STATUS.index("unimplemented"))


@pytest.mark.single
def test_numbers_are_those_of_the_headers():
    """Of the package onednn-devel, which only developers need."""
    try:
        files = importlib.metadata.files("onednn-devel") or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("onednn-devel is not installed")
    headers = {x.name: Path(x.locate()).read_text() for x in files if x.name in ("dnnl_graph_types.h", "dnnl_common_types.h")}
    graph, common = headers["dnnl_graph_types.h"], headers["dnnl_common_types.h"]
    ours = {
        **{f"dnnl_graph_op_{name}": n for name, n in _onednn.OPS.items()},
        **{f"dnnl_graph_op_attr_{name}": n for name, n in _onednn.ATTRIBUTES.items()},
        **{f"dnnl_{name}": n for n, name in enumerate(_onednn.STATUS)},
        **{"dnnl_cpu": _onednn.CPU, "dnnl_gpu": _onednn.GPU},
        **{"dnnl_f16": 1, "dnnl_bf16": 2, "dnnl_f32": 3, "dnnl_s32": 4, "dnnl_boolean": 8},
        "dnnl_graph_tensor_property_undef": _onednn.PROPERTY,
        "dnnl_graph_partition_policy_fusion": _onednn.FUSION,
    }
    theirs = enumerators(graph) | enumerators(common)
    assert {name: theirs[name] for name in ours} == ours
    assert re.search(r"#define DNNL_MAX_NDIMS (\d+)", common)[1] == str(_onednn.MAX_AXES)


def enumerators(header):
    """All names of the enumerations of a header, with their numbers."""
    values = {}
    for body in re.findall(r"typedef enum \{(.*?)\}", re.sub(r"//.*", "", header), re.DOTALL):
        following = 0
        for name, value in re.findall(r"(\w+)\s*(?:=\s*(\w+))?\s*(?:,|$)", body.strip()):
            number = values.get(value) if value in values else int(value.rstrip("uU"), 0) if value else following
            values[name], following = number, number + 1
    return values
