"""Bad input: one rank that passes it stops all ranks with the same error, and the communicator stays usable."""

import re
from fractions import Fraction

import dpnp
import numpy as np
import pytest
from helpers import as_kind, needs_ranks, new_queue, outcomes
from mpi4py import MPI
from ulysses_dp.kernels import manifest

from ulysses_dp import (
    AttnType,
    UlyssesAttention,
    all_to_all_4d,
    attention,
    gather_heads,
    scatter_heads,
    ulysses_attention,
    ulysses_flash_attn_func,
)
from ulysses_dp._call import checks


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def matrix(*shape):
    return ones(*shape).view(np.matrix)


def arguments(**changed):
    """Good arguments of this rank but for what is changed."""
    return {"q": ones(1, 3, 4, 8), "k": ones(1, 3, 2, 8), "v": ones(1, 3, 2, 8)} | changed


def qkv(make):
    """Three arrays that are wrong in the same way."""
    return {name: make(x) for name, x in arguments().items()}


def call(function, arguments):
    """q, k and v by position, as every function takes them."""
    options = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    return function(*(arguments[name] for name in ("q", "k", "v")), **options)


# what is wrong: the changed arguments, the exception, and a pattern for its message
BAD_ARRAYS = {
    "q of 3 axes": (lambda: {"q": ones(3, 4, 8)}, ValueError, r"q must have the 4 axes .* not shape \(3, 4, 8\)"),
    "k of 2 axes": (lambda: {"k": ones(3, 4)}, ValueError, "k must have the 4 axes"),
    "v of 5 axes": (lambda: {"v": ones(1, 1, 3, 2, 8)}, ValueError, "v must have the 4 axes"),
    "head_dim of k and v": (lambda: {"k": ones(1, 3, 2, 4), "v": ones(1, 3, 2, 4)}, ValueError, "head_dim"),
    "head_dim of v": (lambda: {"v": ones(1, 3, 2, 577)}, ValueError, "head_dim of v must be from 1 to 576, not 577"),
    "length of v": (lambda: {"v": ones(1, 2, 2, 8)}, ValueError, "k and v must have the same shape"),
    "batch": (lambda: {"q": ones(2, 3, 4, 8)}, ValueError, "batch"),
    "heads": (lambda: {"q": ones(1, 3, 5, 8)}, ValueError, "heads of q .* not 5 and 2"),
    "no kv heads": (lambda: {"k": ones(1, 3, 0, 8), "v": ones(1, 3, 0, 8)}, ValueError, "heads of q .* not 4 and 0"),
    "dtypes": (lambda: {"k": ones(1, 3, 2, 8, dtype=np.float64)}, TypeError, "q, k and v must have one dtype"),
    "int": (
        lambda: qkv(lambda x: x.astype(int)),
        TypeError,
        "q has dtype int64; supported are float32",
    ),
    "complex": (lambda: qkv(lambda x: x.astype(np.complex64)), TypeError, "q has dtype complex64"),
    "uint16": (lambda: qkv(lambda x: x.astype(np.uint16)), TypeError, "q has dtype uint16; .* give dtype='bfloat16'"),
    "big-endian": (lambda: qkv(lambda x: x.astype(">f4")), TypeError, "q has dtype >f4; .* native byte order"),
    "object": (lambda: {"v": arguments()["v"].astype(object)}, TypeError, "v has dtype object"),
    "queues": (lambda: qkv(lambda x: as_kind(x, "dpnp", new_queue())), ValueError, "q, k and v must be on one queue"),
    "kinds": (lambda: {"k": dpnp.ones((1, 3, 2, 8), dtype="f4")}, TypeError, "one kind, not .*k: dpnp.ndarray"),
    "list": (lambda: {"q": arguments()["q"].tolist()}, TypeError, "q must be an array .* not builtins.list"),
    "None": (lambda: {"v": None}, TypeError, "v must be an array .* not builtins.NoneType"),
    "matrix": (lambda: {"q": matrix(3, 4)}, TypeError, "q must be an array .* not numpy.*matrix"),
    "masked": (lambda: {"k": np.ma.array(arguments()["k"])}, TypeError, "k must be an array .* not numpy.ma.*MaskedArray"),
    "head_dim 577": (lambda: qkv(lambda x: ones(*x.shape[:3], 577)), ValueError, "head_dim .* from 1 to 576, not 577"),
    "head_dim 0": (lambda: qkv(lambda x: ones(*x.shape[:3], 0)), ValueError, "head_dim .* from 1 to 576, not 0"),
}
BAD_OPTIONS = [
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a real number or None, not str"),
    ({"softmax_scale": 1j}, TypeError, "softmax_scale must be a real number or None, not complex"),
    ({"softmax_scale": True}, TypeError, "softmax_scale must be a real number or None, not bool"),
    ({"softmax_scale": np.ones(1)}, TypeError, "softmax_scale must be a real number or None, not ndarray"),
    ({"softmax_scale": np.nan}, ValueError, "softmax_scale must be finite, not nan"),
    ({"softmax_scale": -np.inf}, ValueError, "softmax_scale must be finite, not -inf"),
    ({"softmax_scale": -(10**400)}, ValueError, r"softmax_scale must be at most 1e\+30 in size"),
    ({"window_size": ((1, 2), 3)}, TypeError, "window_size must be an integer, not tuple"),
    ({"causal": 1}, TypeError, "causal must be a bool, not int"),
    ({"causal": None}, TypeError, "causal must be a bool, not NoneType"),
    ({"window_size": (3, -2)}, ValueError, r"window_size must be at least 0, or -1 for no limit, not \(3, -2\)"),
    ({"window_size": np.array(3)}, TypeError, r"window_size must be two integers \(left, right\), not array\(3\)"),
    ({"window_size": np.ones((2, 2), int)}, TypeError, "window_size must be an integer, not list"),
    ({"softmax_scale": np.float16(np.inf)}, ValueError, "softmax_scale must be finite, not inf"),
    ({"alibi_slopes": [[1.0], [2.0, 3.0]]}, TypeError, "alibi_slopes must be an array or a sequence of numbers"),
    ({"alibi_slopes": matrix(1, 4)}, TypeError, "alibi_slopes must be an array or a sequence, not numpy.*matrix"),
    ({"bias": matrix(3, 3)}, TypeError, "bias must be an array .* not numpy.*matrix"),
    ({"colour": "red"}, TypeError, "there is no option 'colour'; there are softmax_scale, causal"),
    ({"window_size": None}, TypeError, r"window_size must be two integers \(left, right\), not None"),
    ({"alibi_slopes": ones(3)}, ValueError, r"alibi_slopes must have shape \(4,\) or \(1, 4\), .* not \(3,\)"),
]
BAD_KEYWORDS = [
    ({"return_lse": 0}, TypeError, "return_lse must be a bool, not int"),
    (
        {"attn_type": "numpy"},
        TypeError,
        "attn_type must be a member of AttnType, a function or .* not 'numpy'; see AttnType.from_string",
    ),
    ({"softcap": -30.0}, ValueError, "softcap must be from 1e-30 to 1e.30, or 0 for none, not -30.0"),
    ({"sinks": ones(3)}, ValueError, r"sinks must have shape \(4,\), one for every head, not \(3,\)"),
    ({"layout": "bdsh"}, ValueError, "layout must be one of bhsd, bshd, sbhd, thd, not 'bdsh'"),
    ({"layout": (0, 1, 2, 2)}, ValueError, "layout must be one of"),
    ({"layout": (0, 1, 2, ones(1))}, TypeError, "layout must be an integer, not ndarray"),
    ({"layout": (False, True, 2, 3)}, TypeError, "layout must be an integer, not bool"),
    ({"layout": np.arange(4)}, TypeError, "layout must be a string, not ndarray"),
    ({"dtype": ones(3)}, TypeError, "dtype must be a string, not ndarray"),
    ({"attn_type": ones(3)}, TypeError, "attn_type must be a member of AttnType"),
    ({"layout": 3}, TypeError, "layout must be a string, not int"),
    ({"dtype": np.float32}, TypeError, "dtype must be a string, not type"),
    ({"dtype": "float64"}, TypeError, "q has dtype float32, but dtype is 'float64'"),
]
BAD_EXCHANGE = [
    ({"exchange": "fast"}, ValueError, "exchange must be one of 'auto', 'device', 'host', 'shared', not 'fast'"),
    ({"exchange": None}, ValueError, "exchange must be one of"),
    ({"exchange": ["auto"]}, ValueError, "exchange must be one of"),
    ({"exchange": np.array(["auto", "host"])}, ValueError, "exchange must be one of"),
    ({"overlap": np.array(["auto"])}, TypeError, "overlap must be an integer, not ndarray"),
    ({"node_size": np.array(["auto"])}, TypeError, "node_size must be an integer, not ndarray"),
]
BAD_DROPOUT = [
    ({"dropout_p": 0.1}, ValueError, "seed must be given with dropout_p = 0.1"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a real number, not NoneType"),
]


def with_arrays(cases):
    return [pytest.param(*case, id=name) for name, case in cases.items()]


def with_options(cases):
    return [
        pytest.param(lambda changed=changed: changed, error, pattern, id=" ".join(map(str, *changed.items())))
        for changed, error, pattern in cases
    ]


BAD_FOR_ATTENTION = with_arrays(BAD_ARRAYS) + with_options(BAD_OPTIONS + BAD_KEYWORDS)


@pytest.mark.single
@pytest.mark.parametrize(("changed", "error", "pattern"), BAD_FOR_ATTENTION)
def test_attention(changed, error, pattern):
    with pytest.raises(error, match=pattern):
        call(attention, arguments(**changed()))


@pytest.mark.single
@pytest.mark.parametrize(
    "options",
    [
        {"softmax_scale": np.float16(0.5)},
        {"softmax_scale": np.longdouble(0.5)},
        {"softcap": np.float16(5)},
        {"softcap": np.int8(5)},
        {"dropout_p": np.float16(0.5), "seed": np.uint64(2**64 - 1)},
        {"alibi_slopes": np.ones(4, np.float16)},
        {"sinks": np.ones(4, np.float16)},
        {"window_size": [np.int8(2), np.int64(1)]},
        {"window_size": np.array([2, 1], np.int8)},
        {"layout": (np.int64(0), 1, 2, 3)},
    ],
    ids=str,
)
def test_numbers_of_numpy(options):
    """Without a warning, which the tests take for an error; and as the numbers of Python."""
    plain = {name: as_python(value) for name, value in options.items()}
    np.testing.assert_array_equal(call(attention, arguments(**options)), call(attention, arguments(**plain)))


def as_python(value):
    """The same in Python's numbers; slopes and sinks in float64."""
    if isinstance(value, tuple | list):
        return tuple(int(n) for n in value)
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return value.item() if not isinstance(value, np.longdouble) else float(value)


@pytest.mark.single
def test_fields_of_structured_arrays():
    """Their strides are no multiples of their itemsize."""
    whole = {}
    for name, x in arguments(bias=np.arange(36, dtype=np.float32).reshape(1, 4, 3, 3) / 9, sinks=ones(4)).items():
        packed = np.zeros(x.shape, dtype=[("before", "u1"), ("x", "f4")])
        packed["x"] = x
        whole[name] = packed["x"]
        assert whole[name].strides[-1] == 5
    copies = {name: x.copy() for name, x in whole.items()}
    np.testing.assert_array_equal(call(attention, whole), call(attention, copies))


def assert_all_raise(comm, bad, good, function, error, pattern):
    """`bad` on the last rank and `good` on the others: the same error everywhere; then `good` everywhere works."""
    last = comm.size - 1
    results = outcomes(comm, bad if comm.rank == last else good)
    assert len(set(results)) == 1, results
    assert results[0] is not None, f"{function} raised nothing"
    raised, message = results[0]
    assert raised is error, message
    by = f"rank {last}: " if comm.size > 1 else ""
    assert re.match(f"{function}: {by}.*{pattern}", message), message
    assert outcomes(comm, good) == [None] * comm.size


@pytest.mark.parametrize(("changed", "error", "pattern"), BAD_FOR_ATTENTION + with_options(BAD_EXCHANGE))
def test_ulysses_attention(comm, changed, error, pattern):
    bad, good = arguments(**changed()), arguments()

    def run(values):
        return lambda: call(ulysses_attention, values)

    assert_all_raise(comm, run(bad), run(good), "ulysses_attention", error, pattern)


# the message names the arguments by the names that this signature gives them
LAYER_ARRAYS = {
    "query of 3 axes": (lambda: {"query": ones(3, 4, 8)}, ValueError, "query must have the 4 axes"),
    "value": (lambda: {"value": None}, TypeError, "value must be an array"),
    "dtypes": (lambda: {"key": ones(1, 3, 2, 8, dtype=np.float64)}, TypeError, "query, key and value must .*, value: float32"),
    "shapes": (
        lambda: {"value": ones(1, 2, 2, 8)},
        ValueError,
        "key and value must have the same shape, but for head_dim, not query: ",
    ),
    "heads": (lambda: {"query": ones(1, 3, 5, 8)}, ValueError, "the heads of query .* those of key and value"),
}
BAD_SOFTCAP = [({"softcap": "30"}, TypeError, "softcap must be a real number, not str")]
BAD_PROBS = [({"return_attn_probs": 1}, TypeError, "return_attn_probs must be a bool, not int")]
BAD_FOR_LAYER = with_arrays(LAYER_ARRAYS) + with_options(BAD_OPTIONS + BAD_DROPOUT + BAD_SOFTCAP + BAD_PROBS)
BAD_FOR_FUNCTION = with_arrays({"q": BAD_ARRAYS["q of 3 axes"]}) + with_options(BAD_OPTIONS + BAD_DROPOUT + BAD_PROBS)


@pytest.mark.parametrize(("changed", "error", "pattern"), BAD_FOR_LAYER)
def test_layer(comm, changed, error, pattern):
    good = dict(zip(("query", "key", "value"), arguments().values(), strict=True))
    layer = UlyssesAttention(comm)
    assert_all_raise(comm, lambda: layer(**good | changed()), lambda: layer(**good), "UlyssesAttention", error, pattern)


@pytest.mark.parametrize(("changed", "error", "pattern"), BAD_FOR_FUNCTION)
def test_function(comm, changed, error, pattern):
    def run(**changed):
        return lambda: ulysses_flash_attn_func(**arguments(**changed), group=comm)

    assert_all_raise(comm, run(**changed()), run(), "ulysses_flash_attn_func", error, pattern)


def test_layer_attn_type(comm):
    values = arguments().values()
    bad, good = UlyssesAttention(comm, attn_type="intel_sycl"), UlyssesAttention(comm)
    pattern = "attn_type must be a member of AttnType"
    assert_all_raise(comm, lambda: bad(*values), lambda: good(*values), "UlyssesAttention", TypeError, pattern)


BAD_ARRAY = [
    (ones(3, 4, 8), {}, ValueError, "x must have the 4 axes"),
    (ones(1, 3, 4, 8, dtype=np.int32), {}, TypeError, "x has dtype int32"),
    (ones(1, 3, 4, 8, dtype=">f8"), {}, TypeError, "x has dtype >f8"),
    (np.ma.array(ones(1, 3, 4, 8)), {}, TypeError, "x must be an array"),
    ("x", {}, TypeError, "x must be an array .* not builtins.str"),
]
GOOD_X = ones(1, 3, 4, 8)


@pytest.mark.parametrize(
    ("x", "options", "error", "pattern"),
    BAD_ARRAY + [(GOOD_X, {"exchange": "fast"}, ValueError, "exchange must be one of")],
)
def test_scatter_heads(comm, x, options, error, pattern):
    def bad():
        scatter_heads(x, comm=comm, **options)

    assert_all_raise(comm, bad, lambda: scatter_heads(GOOD_X, comm=comm), "scatter_heads", error, pattern)


@pytest.mark.parametrize(
    ("x", "options", "error", "pattern"),
    BAD_ARRAY
    + [
        (GOOD_X, {"exchange": "fast"}, ValueError, "exchange must be one of"),
        (GOOD_X, {"seq_local": -1}, ValueError, "seq_local must not be negative, not -1"),
        (GOOD_X, {"seq_local": 2**63}, ValueError, r"seq_local must be less than 2\*\*63, not 9223372036854775808"),
        (GOOD_X, {"seq_local": 3.0}, TypeError, "seq_local must be an integer, not float"),
        (GOOD_X, {"seq_local": True}, TypeError, "seq_local must be an integer, not bool"),
    ],
)
def test_gather_heads(comm, x, options, error, pattern):
    def bad():
        gather_heads(x, comm=comm, **options)

    assert_all_raise(comm, bad, lambda: gather_heads(GOOD_X, comm=comm), "gather_heads", error, pattern)


def test_seq_local_must_add_up(comm):
    wanted = 2 + comm.rank
    results = outcomes(comm, lambda: gather_heads(GOOD_X, comm=comm, seq_local=wanted if comm.size > 2 else 5))
    given = ", ".join(str(2 + rank if comm.size > 2 else 5) for rank in range(comm.size))
    message = f"gather_heads: the seq_local of all ranks ({given}) must add up to seq, 3"
    assert results == [(ValueError, message)] * comm.size


@pytest.mark.parametrize(
    ("x", "options", "error", "pattern"),
    BAD_ARRAY
    + [
        (GOOD_X, {"scatter_idx": 4}, ValueError, "scatter_idx must be an axis of a 4-D array, not 4"),
        (GOOD_X, {"gather_idx": "1"}, TypeError, "gather_idx must be an integer, not str"),
        (GOOD_X, {"scatter_idx": -3}, ValueError, "scatter_idx and gather_idx must be different axes, not -3 and 1"),
    ],
)
def test_all_to_all_4d(comm, x, options, error, pattern):
    def bad():
        all_to_all_4d(x, comm=comm, **options)

    assert_all_raise(comm, bad, lambda: all_to_all_4d(GOOD_X, comm=comm), "all_to_all_4d", error, pattern)


def assert_all_disagree(comm, this, others, pattern):
    """`this` on the last rank, `others` on the rest: the same ValueError everywhere; then `others` everywhere works."""
    results = outcomes(comm, this if comm.rank == comm.size - 1 else others)
    assert len(set(results)) == 1, results
    assert results[0] is not None, "nothing was raised"
    raised, message = results[0]
    assert raised is ValueError, message
    pattern = f"{pattern}.* must be the same on all ranks, not .* on rank 0.* on rank .*{comm.size - 1}"
    assert re.match(pattern, message), message
    assert outcomes(comm, others) == [None] * comm.size


@needs_ranks
@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"q": ones(2, 3, 4, 8), "k": ones(2, 3, 2, 8), "v": ones(2, 3, 2, 8)}, "batch"),
        ({"q": ones(1, 3, 6, 8)}, "heads"),
        ({"k": ones(1, 3, 4, 8), "v": ones(1, 3, 4, 8)}, "kv_heads"),
        (qkv(lambda x: x[..., :5]), "head_dim"),
        (qkv(np.float64), "dtype"),
        ({"causal": True}, "causal"),
        ({"softmax_scale": Fraction(1, 3)}, "softmax_scale"),
        ({"return_lse": True}, "return_lse"),
        ({"attn_type": AttnType.NUMPY}, "attn_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranks_disagree(comm, changed, pattern):
    def run(**changed):
        return lambda: call(ulysses_attention, arguments(comm=comm, **changed))

    assert_all_disagree(comm, run(**changed), run(), f"ulysses_attention: {pattern}")


@needs_ranks
@pytest.mark.parametrize(
    ("function", "options", "pattern"),
    [
        (scatter_heads, {"x": ones(2, 3, 4, 8)}, "batch"),
        (scatter_heads, {"x": ones(1, 3, 5, 8)}, "heads"),
        (scatter_heads, {"x": ones(1, 3, 4, 7)}, "head_dim"),
        (scatter_heads, {"x": ones(1, 3, 4, 8, dtype=np.float64)}, "dtype"),
        (gather_heads, {"x": ones(1, 2, 4, 8)}, "seq"),
        (all_to_all_4d, {"x": GOOD_X, "scatter_idx": 3}, ""),
        (all_to_all_4d, {"x": GOOD_X, "scatter_idx": 1, "gather_idx": 2}, ""),
        (all_to_all_4d, {"x": ones(1, 3, 4, 7)}, ""),
    ],
)
def test_ranks_disagree_on_a_redistribution(comm, function, options, pattern):
    x, options = options["x"], {name: value for name, value in options.items() if name != "x"}
    pattern = f"{function.__name__}: .*{pattern}"
    assert_all_disagree(comm, lambda: function(x, comm=comm, **options), lambda: function(GOOD_X, comm=comm), pattern)


@needs_ranks
def test_ranks_disagree_on_the_axes_of_a_layer(comm):
    x = ones(1, 4, 4, 8)
    this, others = UlyssesAttention(comm, 1, 2), UlyssesAttention(comm)
    assert_all_disagree(comm, lambda: this(x, x, x), lambda: others(x, x, x), "UlyssesAttention: axes")


@needs_ranks
def test_ranks_call_different_functions(comm):
    """Each rank names its own function first, then all say the same."""

    def run():
        if comm.rank == 0:
            gather_heads(GOOD_X, comm=comm)
        else:
            call(ulysses_attention, arguments(comm=comm))

    results = outcomes(comm, run)
    assert {error for error, _ in results} == {ValueError}
    said = {message.partition(": ")[2] for _, message in results}
    others = ", ".join(map(str, range(1, comm.size)))
    assert said == {f"function must be the same on all ranks, not gather_heads on rank 0, ulysses_attention on rank {others}"}
    assert outcomes(comm, lambda: scatter_heads(GOOD_X, comm=comm)) == [None] * comm.size


def no_use(*_):
    raise RuntimeError("no use")


@pytest.mark.parametrize(
    "run", [lambda comm: call(ulysses_attention, arguments(comm=comm)), lambda comm: scatter_heads(GOOD_X)]
)
@pytest.mark.parametrize(("module", "name"), [(manifest, "read"), (checks, "default_queue")])
def test_no_device_or_kernels_on_one_rank(comm, monkeypatch, run, module, name):
    """What is found out on one rank alone, and late if nobody asks, stops all ranks too."""
    with monkeypatch.context() as patch:
        if comm.rank == comm.size - 1:
            patch.setattr(module, name, no_use)
        results = outcomes(comm, lambda: run(comm))
    assert len(set(results)) == 1, results
    assert results[0] is not None
    assert results[0][0] is RuntimeError
    by = f"rank {comm.size - 1}: " if comm.size > 1 else ""
    assert results[0][1].endswith(f": {by}RuntimeError: no use")
    assert outcomes(comm, lambda: run(comm)) == [None] * comm.size


@needs_ranks
def test_the_lowest_rank_with_an_error_is_heard(comm):
    def run():
        call(ulysses_attention, arguments(comm=comm, causal=1) if comm.rank else arguments(comm=comm, softmax_scale=2.0))

    message = "ulysses_attention: rank 1: causal must be a bool, not int"
    assert outcomes(comm, run) == [(TypeError, message)] * comm.size


# the name of the function, what it calls the communicator, and a good call with one
COLLECTIVES = [
    ("ulysses_attention", "comm", lambda comm: call(ulysses_attention, arguments(comm=comm))),
    ("UlyssesAttention", "sequence_process_group", lambda comm: UlyssesAttention(comm)(*arguments().values())),
    ("ulysses_flash_attn_func", "group", lambda comm: ulysses_flash_attn_func(**arguments(), group=comm)),
    ("scatter_heads", "comm", lambda comm: scatter_heads(GOOD_X, comm=comm)),
    ("gather_heads", "comm", lambda comm: gather_heads(GOOD_X, comm=comm)),
    ("all_to_all_4d", "comm", lambda comm: all_to_all_4d(GOOD_X, comm=comm)),
]


@pytest.mark.parametrize(("name", "argument", "run"), COLLECTIVES, ids=[name for name, *_ in COLLECTIVES])
def test_communicators(comm, name, argument, run):
    for no_communicator in ("world", 0, MPI.COMM_WORLD.Get_group()):
        with pytest.raises(TypeError, match=f"{name}: {argument} must be an mpi4py communicator or None, not"):
            run(no_communicator)
    freed = comm.Dup()
    freed.Free()
    for nothing in (MPI.COMM_NULL, freed):
        with pytest.raises(ValueError, match=f"{name}: {argument} is MPI.COMM_NULL"):
            run(nothing)


@needs_ranks
@pytest.mark.parametrize(("name", "argument", "run"), COLLECTIVES, ids=[name for name, *_ in COLLECTIVES])
def test_intercommunicators(comm, name, argument, run):
    first_half = comm.rank < comm.size // 2
    mine = comm.Split(first_half, comm.rank)
    between = mine.Create_intercomm(0, comm, comm.size // 2 if first_half else 0)
    with pytest.raises(ValueError, match=f"{name}: {argument} is an intercommunicator"):
        run(between)
    between.Free()
    mine.Free()


@pytest.mark.parametrize("equal", [{"causal": 0}, {"softcap": True}, {"window_size": (True, 1)}, {"softmax_scale": True}])
def test_options_that_equal_those_of_the_last_call_are_told_from_them_by_their_types(equal):
    q = ones(1, 3, 4, 8)
    for options in ({"causal": False}, {"softcap": 1.0}, {"window_size": (1, 1)}, {"softmax_scale": 1.0}):
        attention(q, q, q, **options)
    with pytest.raises(TypeError, match=next(iter(equal))):
        attention(q, q, q, **equal)
