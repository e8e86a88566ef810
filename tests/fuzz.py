"""Random calls of everything at once, compared with a dense oracle of their own: `make fuzz MINUTES=10`.

The driver starts 1 to 5 ranks in turns, which all draw the same cases from the printed seed. A case is a choice of `SPACE`; one
that fails is made plainer as long as it fails in the same way, and printed with the command that runs it alone. Before every
call all memory that the library keeps is filled with garbage; every array lies in a zone of nan, which nobody may write to.
"""

import argparse
import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import dpnp
import fuzz_oracle as oracle
import numpy as np
from checks import AXES, decode, encode, kinds_of
from helpers import as_kind, as_numpy, part, split
from mpi4py import MPI

import ulysses_dp as library
from ulysses_dp._device import workspace
from ulysses_dp._device.arrays import tensor
from ulysses_dp._device.queue import default_queue

try:
    import torch
except ImportError:
    torch = None

WORLD = MPI.COMM_WORLD
WRONG = 7  # exit status of a run in which something was wrong, but which came to its end
UNIT = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7, "bits": 2.0**-7}
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 33, 40, 47, 63, 64, 65, 80, 100, 127, 128, 129, 161, 192, 255, 256)
TOTALS = (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16, 17, 23, 31, 32, 33, 48, 61, 64, 65, 97, 130, 0)
SPANS, SPLITS = (-1, 0, 1, 3, 8, 40), ("first", "even", "uneven", "gaps", "last")
# by name: the chance to take one of the values after the first, which is the plainest, and the values
SPACE = {
    "call": (
        0.6,
        ("ulysses", "local", "local", "class", "flash", "decode", "trade", "trade", "4d", "merge", "refuse", "refuse"),
    ),
    "kind": (0.7, ("numpy", "dpnp", "usm", "dpnp", "usm", *(["torch"] if torch else []), "array_api_strict")),
    "form": (0.5, ("float32", "float64", "float16", "bfloat16", "bits")),
    "attn_type": (0.5, ("INTEL_SYCL", "NUMPY", *(["TORCH"] if find_spec("torch") else []), "INTEL_ONEDNN", "user", "AUTO")),
    "schedule": (0.6, ("", "wide", "narrow", "short", "wide", "narrow", "short", "gpu")),
    "gradient": (0.8, ("", "plain", "ctx")),
    "layout": (0.7, ("bshd", "sbhd", "bhsd", "thd", "thd", "0321", "3012", "2130", "1302")),
    "batch": (0.5, (1, 2, 2, 3, 5, 0)),
    "kv_heads": (0.8, (1, 2, 3, 4, 5, 7)),
    "group": (0.6, (1, 2, 3, 4, 5, 0)),
    "head_dim": (0.95, (*WIDTHS, *WIDTHS[:14])),
    "head_dim_v": (0.2, (None, *WIDTHS)),
    "seq": (0.97, TOTALS),
    "split": (0.9, SPLITS),
    "seq_k": (0.4, (None, *TOTALS)),
    "split_k": (0.9, SPLITS),
    "reversed": (0.1, (False, True)),
    "ring": (0.3, (1, 2, 3, 4, 5)),
    "order": (0.3, ("contiguous", "zigzag", "zigzag_ranks", "striped")),
    "kv": (0.5, ("auto", "ring", "all_gather")),
    "tokens": (0.15, ((0, 0), (1, 1), (3, 3), (8, 2), (0, 4), (5, 0))),  # that every rank holds, queries and keys
    "tokens_at": (0.5, ("start", "end")),
    "cuts": (0.8, (0, 1, 2, 3, 8)),
    "cuts_k": (0.4, (False, True)),
    "causal": (0.4, (False, True)),
    "left": (0.2, SPANS),
    "right": (0.2, SPANS),
    "softcap": (0.15, (0.0, 1.5, 0.3, 20.0, 1e-3)),
    "scale": (0.2, (None, 1.3, 0.01, -0.4, 0.0)),
    "alibi": (0.2, ("", "heads", "batch")),
    "mask": (0.2, (1, 0.8, 0.3, 0.0)),
    "sinks": (0.2, ("", "some", "hidden")),
    "dropout": (0.15, (0.0, 0.1, 0.5, 0.9)),
    "bias": (0.3, ("", "1111", "bhqk", "11qk", "bh1k", "1h1k", "b11k", "bhq1")),
    "bias_dtype": (0.5, ("float32", "float64", "float16", "bfloat16")),
    "bias_host": (0.4, (False, True)),
    "bias_hides": (0.3, (0, 0.2, 0.9)),
    "bias_huge": (0.4, (0, -1e9, -3e5, float(np.finfo(np.float32).min), 1e9)),
    "bias_repeats": (0.3, (False, True)),
    "ranges": (0.2, ("", "chunks", "random", "of batch")),
    **dict.fromkeys(("dlse", "max_logit", "bias_grad", "slopes_grad"), (0.3, (False, True))),
    "overlap": (0.3, ("auto", 1, 2, 3, 9)),
    "node_size": (0.3, (1, "all", "auto")),
    "exchange": (0.3, ("auto", "device", "host", "shared")),
    **{
        f"odd {x}": (0.5, (False, True))
        for x in ("q", "k", "v", "dout", "out", "lse", "alibi", "sinks", "mask", "bias", "x", "a")
    },
    **{
        f"flat {x}": (0.04, (None, 0, 1, 2, 3)) for x in ("q", "k", "v", "dout")
    },  # the same numbers along an axis: a stride of 0
    "field": (0.05, (False, True)),
    **{f"nan {x}": (0.03, (False, True)) for x in ("q", "k", "v", "dout")},
}
# what an argument must not be; what can be called, is called with what it is
BAD = {
    "window_size": [3, (1,), (-2, 0), (0.5, 1), "ab", None, np.zeros((2, 2), int)],
    "softcap": [-1.0, np.nan, "3", 1e300, None, 2j, np.ones(1)],
    "softmax_scale": [np.inf, "x", 1e300, True, [1.0], np.ones(1)],
    "dropout_p": [1.0, -0.1, np.nan, "0.5", None],
    "alibi_slopes": [np.ones(99), [np.nan], "slopes", np.ones((2, 3, 4)), np.array([1j]), 3.0, [[1.0], [1.0, 2.0]]],
    "sinks": [np.ones(99), [[1.0]], "sinks", {}, np.array(["a"]), [np.inf]],
    "bias": [np.zeros(1), np.zeros((1, 1, 1, 1), int), 3.0, [[[[0.0]]]], np.zeros((9, 9, 9, 9)), np.ma.zeros((1, 1, 1, 1))],
    "key_padding_mask": [np.ones((77, 1), bool), np.ones((1, 1)), "mask", np.ones(3, bool), [[True], [True, False]]],
    "layout": ["dhsb", 5, (0, 1, 2), (0, 1, 2, 2), [0, 1, 2, 3], tuple("bshd"), np.arange(4), (0.0, 1, 2, 3), ([], 1, 2, 3)],
    "attn_type": ["torch", 3, None],
    "exchange": ["fast", 3, None, np.zeros(2), ["auto"]],
    "overlap": [0, -1, "two", 1.5, True, None, np.zeros(2)],
    "node_size": [0, 77, "two", 1.5, None, np.ones(3)],
    "causal": [1, "yes", None, np.ones(2)],
    "dtype": ["int8", 3, np.float32, ["bfloat16"], np.zeros(2)],
    "cu_seqlens_q": [[1, 2], [0, 3, 2], [0.0, 1.0], "01", [[0, 1]], [], [0, 10**6]],
    "seed": [-1, 2**64, 1.5, "seed"],
    "return_lse": [1, "yes", None],
    "q": [None, [1.0], "q", lambda x: x[..., 0], lambda x: x[..., :0], lambda x: as_numpy(x).astype(int)],
    "k": [None, lambda x: x[..., :-1], lambda x: x[..., 0], lambda x: as_numpy(x).astype(int), lambda x: as_numpy(x)[None]],
    "v": [None, 5, lambda x: x[:, :, :, :0], lambda x: as_numpy(x).astype("O")],
}
DIFFERENT = {"causal": True, "softmax_scale": 0.37, "softcap": 7.0, "window_size": (2, 2), "overlap": 2, "return_lse": True}


class Failure(Exception):  # noqa: N818
    """What is wrong, the same on all ranks."""


def draw(seed, ranks, number):
    """A case for so many ranks, by name."""
    rng = np.random.default_rng([seed, ranks, number])
    wild = rng.choice([0.3, 1, 1, 1.5])
    case = {name: x[rng.integers(1, len(x)) if rng.random() < p * wild else 0] for name, (p, x) in SPACE.items()}
    return case | {"seed": number, "ranks": ranks if rng.random() < 0.7 else int(rng.integers(1, ranks + 1))}


def simpler(case):
    """Plainer cases: many things plain at once, then one by one, then a little less of each."""
    odd = [name for name, (_, values) in SPACE.items() if case[name] != values[0]]
    for size in (16, 4, 1):
        chunks = (odd[start : start + size] for start in range(0, len(odd), size))
        yield from (case | {name: SPACE[name][1][0] for name in chunk} for chunk in chunks)
    yield from (case | {"ranks": n} for n in range(1, case["ranks"]))
    for name in odd:
        values = SPACE[name][1]
        yield from (case | {name: value} for value in dict.fromkeys(values[1 : values.index(case[name])]))


def mended(case):
    """The case without what does not go together, and with what follows from it."""
    c = dict(case)
    foreign = c["attn_type"] in ("TORCH", "INTEL_ONEDNN")
    if foreign and c["seed"] % 10:
        c |= {"softcap": 0.0, "sinks": "", "dropout": 0.0}
    if c["call"] not in ("ulysses", "class", "flash") or c["ranks"] % c["ring"]:
        c |= {"ring": 1, "order": "contiguous"}
    c["mesh"] = c["ring"] > 1 or c["order"] != "contiguous"
    if c["call"] != "ulysses" or c["order"] != "contiguous":
        c["tokens"] = (0, 0)
    if c["mesh"] or c["call"] == "decode":  # what they do not have
        foreign, c["attn_type"] = False, "NUMPY" if c["attn_type"] == "NUMPY" else "INTEL_SYCL"
        c |= {"overlap": "auto", "node_size": 1, "bias_huge": 0}
    if c["exchange"] == "shared":
        c |= {"node_size": 1}  # it has no second step
    if c["attn_type"] == "user":
        c |= {"dropout": 0.0}  # its function does not learn which heads it has
    if foreign or c["attn_type"] == "user":
        c |= {"dlse": False, "max_logit": False, "bias_grad": False, "slopes_grad": False}
    if c["dropout"] and c["ranges"] == "of batch":
        c["ranges"] = "random"
    if c["schedule"] == "gpu" and c["ranks"] > 1:
        c["schedule"] = ""
    if c["schedule"] == "gpu":  # half a minute of compiling for each head_dim, in every process
        plain = [x for x in SPACE if x[:3] in ("lef", "rig", "sof", "ali", "mas", "sin", "dro", "bia", "nan", "ran")]
        c |= {x: SPACE[x][1][0] for x in plain} | {"form": "float32", "head_dim": (64, 128, 32, 96, 80)[c["seed"] // 500 % 5]}
        c["head_dim_v"] = None
    forms = {"array_api_strict": ("float32", "float64"), "torch": UNIT}
    if c["form"] not in forms.get(c["kind"], UNIT) or c["kind"] not in (*forms, *kinds_of(c["form"])):
        c["form"] = "float32"
    if c["form"] == "bits" and c["kind"] in ("torch", "array_api_strict"):
        c["kind"] = "numpy"
    if c["call"] == "flash" or (c["layout"] == "thd" and c["call"] in ("class", "decode", "refuse")):
        c["layout"] = "bshd"
    if c["layout"] == "thd":
        c |= {"batch": 1, "alibi": c["alibi"] and "heads"}
    c["axes"] = AXES.get(c["layout"]) or (AXES["bshd"] if c["layout"] == "thd" else tuple(map(int, c["layout"])))
    if c["call"] == "class" and c["axes"][0] > c["axes"][3]:  # takes the first of the other axes for the batch
        c["axes"] = AXES["bhsd"]
    c["packed"], c["heads"] = c["layout"] == "thd", c["group"] * c["kv_heads"]
    seq = min(c["seq"], int(5 + 3e5 / (c["batch"] * c["heads"] * c["head_dim"] + 1)))
    c["rows"] = c["rows_k"] = split(seq, c["ranks"], c["split"])
    if c["seq_k"] is not None and c["call"] != "refuse":
        c["rows_k"] = split(c["seq_k"], c["ranks"], c["split_k"])
    if foreign or c["attn_type"] in ("AUTO", "user"):
        c |= {x: False for x in SPACE if x.startswith("nan")}
    c["unit"] = UNIT["float64" if c["form"] == "float64" else c["form"] if foreign else "float32"]  # of the computation
    c["unit_of_scores"] = UNIT["float64"] if c["attn_type"] == "NUMPY" else c["unit"]
    c["of_lse"] = "float64" if c["form"] == "float64" else "float32"
    return c


def place(name, x, c, comm, guards, flat=None, kind=None):
    """Numbers as an array of the kind of the case, in a zone of nan; odd ones with strides that nobody would choose."""
    rng = np.random.default_rng([c["seed"], comm.rank, *name.encode()])
    odd, kind = c[f"odd {name}"], kind or c["kind"]
    strides, extent = [0] * x.ndim, 1
    for axis in rng.permutation(x.ndim) if odd else reversed(range(x.ndim)):
        n = x.shape[axis]
        if axis == flat and n:
            continue
        step = extent * int(rng.choice([1, 1, 1, 2, 3])) + int(rng.integers(3)) * (extent > 1) if odd else extent
        strides[axis], extent = step, step * max(n, 1)
        if odd and kind not in ("torch", "array_api_strict"):
            strides[axis] = int(rng.choice([step, 0, 1, 7, -5, 1000]) if n == 1 else rng.choice([step, step, -step]))
    offset = 5 + sum((n - 1) * -step for n, step in zip(x.shape, strides, strict=True) if step < 0 and n)
    memory = np.full((extent + 12 + offset) * x.dtype.itemsize, 1 if x.dtype.kind in "bi" else 255, np.uint8).view(x.dtype)
    size = x.dtype.itemsize
    view = np.ndarray(x.shape, x.dtype, memory, offset * size, [s * size for s in strides])
    view[...] = x
    kept = memory
    if kind == "numpy" and c["field"]:  # of a packed structure: no number is where its size would put it
        kept = np.zeros(x.shape, [("before", "u1"), ("x", x.dtype)])
        kept["x"], view = x, kept["x"]
    if kind in ("dpnp", "usm"):
        kept = tensor.asarray(memory, sycl_queue=default_queue())
        array, size = (dpnp.ndarray, size) if kind == "dpnp" else (tensor.usm_ndarray, 1)  # whose strides count other things
        view = array(x.shape, dtype=x.dtype, buffer=kept.usm_data, strides=tuple(s * size for s in strides), offset=offset)
    elif kind == "torch":
        kept = torch.from_numpy(memory.view(np.uint16) if x.dtype.kind == "V" else memory)
        kept = kept.view(torch.bfloat16) if x.dtype.kind == "V" else kept
        view = torch.as_strided(kept, x.shape, strides, offset)
    elif kind == "array_api_strict":
        view = as_kind(view, kind)
    guards.append((name, kept, as_numpy(kept).tobytes()))
    return view


def like(x, form, q):
    """Numbers as an array of the kind of q."""
    x = np.ascontiguousarray(encode(x, form))
    if type(q) is np.ndarray:
        return x
    if torch and isinstance(q, torch.Tensor):
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if form == "bfloat16" else torch.from_numpy(x)
    return as_kind(
        x, {dpnp.ndarray: "dpnp", tensor.usm_ndarray: "usm"}.get(type(q), "array_api_strict"), getattr(q, "sycl_queue", None)
    )


def by_user(q, k, v, dout=None, *, lse=None, delta=None, return_lse=False, dtype=None, **options):
    """The oracle as a user's attention."""
    form = "bits" if dtype else str(q.dtype).split(".")[-1]
    of_lse = "float64" if form == "float64" else "float32"
    options = {name: as_numpy(x) if hasattr(x, "shape") else x for name, x in options.items()}
    arrays = [None if x is None else decode(x).astype(float) for x in (q, k, v, dout)]
    results = oracle.attention(*arrays, unit=UNIT[of_lse], **options)
    if dout is not None:
        return tuple(like(results[name][0], form, q) for name in ("dq", "dk", "dv"))
    out = like(results["out"][0], form, q)
    return (out, like(results["lse"][0], of_lse, q)) if return_lse else out


USER = library.register_attention("fuzz", by_user, backward=lambda dout, *qkv, **options: by_user(*qkv, dout, **options))


def poison():
    """Fill all memory that the library keeps for later with garbage: no result may depend on it."""
    store = workspace._store()
    free = [entry[1] for entry in store.results if workspace._references(entry) == workspace._REFERENCES_OF_POOL]
    scratch = [memory for memory in store.memories.values() if not isinstance(memory, tensor.usm_ndarray)]  # not masks
    for memory in (*scratch, *free):
        tensor.usm_ndarray((memory.nbytes,), dtype="u1", buffer=memory)[...] = 255
    default_queue().wait()


def allocate_garbage(queue, nbytes, usm_type, allocate=workspace._allocate):
    """New memory, full of nan."""
    memory = allocate(queue, nbytes, usm_type)
    tensor.usm_ndarray((memory.nbytes,), dtype="u1", buffer=memory)[...] = 255
    return memory


workspace._allocate = allocate_garbage


def outcome(comm, function, accept="^$"):
    """What a call returns, or None for an error that is accepted. Errors have to be the same on all ranks."""
    poison()
    result, error = None, ""
    try:
        result = function()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    errors = comm.allgather(error)
    if len(set(errors)) > 1:
        raise Failure(f"errors differ between ranks: {errors}")
    if error and not re.search(accept, error):
        raise Failure(error)
    return result if not error else None


def compare(comm, results, guards):
    """Results by name: what came, its form, the array that it should resemble, and (expected, tolerance)."""
    problems = [f"{name} was written to" for name, kept, before in guards if as_numpy(kept).tobytes() != before]
    for name, (x, form, given, (expected, tolerance)) in results.items():
        got = decode(x).astype(float)
        if type(x) is not type(given) or getattr(x, "sycl_queue", None) != getattr(given, "sycl_queue", None):
            problems.append(f"{name} is {type(x).__name__} elsewhere")
        elif x.dtype != like(np.zeros(1), form, given).dtype or got.shape != expected.shape:
            problems.append(f"{name} is {x.dtype} {got.shape}, not {form} {expected.shape}")
        else:
            with np.errstate(invalid="ignore"):
                wrong = ~((abs(got - expected) <= tolerance) | (got == expected) | np.isinf(tolerance))
            for at in np.argwhere(wrong)[:1]:
                at, values = tuple(map(int, at)), f"{got[tuple(at)]} not {expected[tuple(at)]} ± {tolerance[tuple(at)]:.1e}"
                problems.append(f"{name}: {wrong.sum()} of {wrong.size} wrong, {at}: {values}")
    everyone = comm.allgather("; ".join(problems))
    if any(everyone):
        raise Failure(" | ".join(f"rank {rank}: {x}" for rank, x in enumerate(everyone) if x))


def options_of(c, rng, comm, guards):
    """The options as the library gets them, and as the oracle does."""
    shape = sizes = c["batch"], c["heads"], *(sum(x, n) for x, n in zip((c["rows"], c["rows_k"]), c["tokens"], strict=True))
    ours = {"causal": c["causal"], "window_size": (c["left"], c["right"]), "softcap": c["softcap"], "softmax_scale": c["scale"]}
    ours |= {"dropout_p": c["dropout"], "seed": 2**63 + c["seed"]} if c["dropout"] else {}
    theirs, arrays, kind = {}, {}, None
    if c["alibi"]:
        arrays["alibi"] = (rng.random(shape[c["alibi"] == "heads" : 2]) - 0.3).astype(c["of_lse"])
    if c["sinks"]:
        sinks = rng.standard_normal(shape[1])
        arrays["sinks"] = np.where(rng.random(shape[1]) < 0.5 * (c["sinks"] == "hidden"), -np.inf, sinks).astype(c["of_lse"])
    if c["mask"] < 1:
        arrays["mask"] = rng.random((shape[0], shape[3])) < c["mask"]
    if c["bias"]:
        dtype = c["bias_dtype"] if c["kind"] == "numpy" or c["bias_host"] else c["of_lse"]
        kind = "numpy" if c["bias_host"] else None
        shape = [1 if x == "1" else n for n, x in zip(shape, c["bias"], strict=True)]
        x = np.where(rng.random(shape) < c["bias_hides"], -np.inf, rng.standard_normal(shape))
        highest = 6e4 if dtype == "float16" else 3e38 if dtype == "bfloat16" else np.inf
        x = np.where(
            (rng.random((1, 1, shape[2], 1)) < 0.4 * (c["bias_huge"] != 0)) & (x > -np.inf), c["bias_huge"], x
        )  # as masks
        x = np.where(x > -np.inf, x.clip(-highest, highest), x)
        arrays["bias"] = encode(x, dtype)
    for name, public in {"alibi": "alibi_slopes", "sinks": "sinks", "mask": "key_padding_mask", "bias": "bias"}.items():
        if name in arrays:
            x, flat = arrays[name], None
            if name == "bias" and c["bias_repeats"]:
                flat = next((n for n in range(4) if x.shape[n] == 1 < sizes[n]), None)
                x = np.broadcast_to(x, [m if n == flat else k for n, (m, k) in enumerate(zip(sizes, x.shape, strict=True))])
            theirs[public] = place(name, x, c, comm, guards, flat, kind if name == "bias" else None)
            ours[public] = x.astype(float) if x.dtype != bool else x
    if c["ranges"]:
        row, keys = np.arange(sizes[2]), sizes[3]
        ours["key_ranges"] = np.minimum(np.stack([row // 5 * 4, row // 5 * 4 + 6], axis=-1), keys)
        if c["ranges"] != "chunks":
            ours["key_ranges"] = rng.integers(0, keys + 1, (*sizes[: c["ranges"] == "of batch"], sizes[2], 2))
    dense = dict(ours)
    if c["packed"]:
        for name, n, wanted in (
            ("cu_seqlens_q", sizes[2], True),
            ("cu_seqlens_k", sizes[3], c["cuts_k"] or sizes[2] != sizes[3]),
        ):
            if wanted:
                dense[name] = np.array([0, *sorted(rng.integers(0, n + 1, c["cuts"])), n], np.int32)
                theirs[name] = dense[name].tolist() if c["seed"] % 2 else dense[name]
    return ours | theirs, dense


def attention(c, comm):
    """Forward, and the gradient of what came, against the oracle."""
    rng, guards, form, local = np.random.default_rng(c["seed"]), [], c["form"], c["call"] == "local"
    tokens = dict(zip("qk", c["tokens"], strict=True))
    queries, keys = (sum(c["rows"], tokens["q"]), c["heads"]), (sum(c["rows_k"], tokens["k"]), c["kv_heads"])
    here, rows, rows_k = (MPI.COMM_SELF, [queries[0]], [keys[0]]) if local else (comm, c["rows"], c["rows_k"])
    whole, mine, of_tokens, held, held_by_all = {}, {}, {}, {}, {}
    options, dense = options_of(c, rng, comm, guards)
    mesh = {"ring": c["ring"], "order": c["order"]} if c["mesh"] else {}
    for name, counts in (("q", rows), ("k", rows_k)):
        at_start = c["tokens_at"] == "start"
        held[name] = part(np.arange(sum(counts)), counts, here.rank, 0) + tokens[name] * at_start
        held_by_all[name] = np.arange(tokens[name]) + sum(counts) * (not at_start)
        if c["order"] != "contiguous":
            ends = dense.get(f"cu_seqlens_{name}", dense.get("cu_seqlens_q"))
            held[name] = library.row_positions(sum(counts), here, **mesh, cu_seqlens=None if ends is None else ends.tolist())
        elif c["call"] == "decode" and name == "q":
            held[name] = np.arange(sum(counts))

    def by_user_axes(x):
        return x[0] if c["packed"] else x.transpose(np.argsort(c["axes"]))

    def of_this_rank(x, name, held=held):
        return by_user_axes(x[:, held["q" if name in ("q", "dq", "dout", "out") else "k"]])

    def lse_of(x, held=held):
        return x[:, :, held["q"]][0 if c["packed"] else ...]

    for name, (seq, heads) in {"q": queries, "k": keys, "v": keys, "dout": queries}.items():
        width = c["head_dim"] if name in ("q", "k") or c["head_dim_v"] is None else c["head_dim_v"]
        x, flat = rng.standard_normal((c["batch"], seq, heads, width)), c[f"flat {name}"]
        if flat is not None and x.size:
            x = np.broadcast_to(x.take([0], flat), x.shape)
        elif c[f"nan {name}"]:
            x = np.where(rng.random(x.shape[:3])[..., None] < 0.1, np.nan, x)
        whole[name] = encode(x, form)
        flat = None if flat is None or c["packed"] else c["axes"][flat]
        mine[name] = place(name, of_this_rank(whole[name], name), c, comm, guards, flat)
        of_tokens[name] = place(name, of_this_rank(whole[name], name, held_by_all), c, comm, guards)
    inputs = (decode(whole[x]).astype(float) for x in ("q", "k", "v", "dout"))
    dlse = rng.standard_normal((c["batch"], c["heads"], queries[0])).astype(c["of_lse"]) if c["dlse"] else None
    bias_shape = np.shape(options["bias"]) if c["bias"] else None
    expected = oracle.attention(
        *inputs,
        dlse=dlse,
        bias_shape=bias_shape,
        unit=c["unit"],
        unit_of_scores=c["unit_of_scores"],
        stored=UNIT[form],
        **dense,
    )
    options |= {"dtype": "bfloat16"} if form == "bits" else {}
    attn_type = USER if c["attn_type"] == "user" else getattr(library.AttnType, c["attn_type"])
    accept = "^NotImplementedError" if c["attn_type"] in ("TORCH", "INTEL_ONEDNN") else "^$"
    os.environ.pop("ULYSSES_DP_SCHEDULE", None)
    os.environ |= {"ULYSSES_DP_SCHEDULE": c["schedule"]} if c["schedule"] else {}
    q, k, v, dout = (mine[x] for x in ("q", "k", "v", "dout"))
    keep, how = c["gradient"] == "ctx" and not local, {}
    mesh |= {"kv": c["kv"]} if mesh else {}
    if c["call"] == "ulysses":
        node_size = c["node_size"] if c["node_size"] != "all" else comm.size
        how = {"overlap": c["overlap"], "node_size": node_size, "exchange": c["exchange"], "comm": comm} | mesh
        how |= {"replicated_at": c["tokens_at"]} if any(c["tokens"]) else {}
    more = {"attn_type": attn_type, "layout": c["layout"] if c["layout"].isalpha() else c["axes"]}

    largest = {"return_max_logit": True} if c["max_logit"] else {}

    def forward(**how):
        if c["call"] == "class":
            layer = library.UlyssesAttention(comm, c["axes"][2], c["axes"][1], attn_type=attn_type, **mesh)
            out, lse, _, *rest = layer(q, k, v, return_attn_probs=True, **options, **largest)
            return out, lse, *rest
        if c["call"] == "flash":
            how = {"return_attn_probs": True, "group": comm} | options | mesh | largest
            out, lse, _, *rest = library.ulysses_flash_attn_func(q, k, v, **how)
            return out, lse, *rest
        if c["call"] == "decode":
            return library.decode_attention(q, k, v, comm=comm, return_lse=True, **options, **more, **largest)
        call = library.attention if local else library.ulysses_attention
        how |= largest | ({"return_ctx": True} if keep else {})
        how |= {"replicated": [of_tokens[x] for x in "qkv"]} if any(c["tokens"]) else {}
        return call(q, k, v, return_lse=True, **options, **more, **how)

    results = outcome(comm, lambda: forward(**how), accept)
    if results is None:
        return
    out, lse, *ctx = results
    results_of_tokens = [ctx.pop(0), ctx.pop(0)] if any(c["tokens"]) else []
    found = {"max_logit": (ctx.pop(0), c["of_lse"], q, expected["max_logit"])} if largest else {}
    results = {
        "out": (out, form, q, tuple(of_this_rank(x, "out") for x in expected["out"])),
        "lse": (lse, c["of_lse"], q, tuple(map(lse_of, expected["lse"]))),
    } | found
    if results_of_tokens:
        out_r, lse_r = results_of_tokens
        results["out_r"] = out_r, form, q, tuple(of_this_rank(x, "out", held_by_all) for x in expected["out"])
        results["lse_r"] = lse_r, c["of_lse"], q, tuple(lse_of(x, held_by_all) for x in expected["lse"])
    compare(comm, results, guards)
    if c["overlap"] != "auto" and how and c["attn_type"] in ("INTEL_SYCL", "NUMPY"):
        again = outcome(comm, lambda: forward(comm=comm, **{x: how[x] for x in how if x == "replicated_at"}))[0]
        if not all(comm.allgather(as_numpy(again).tobytes() == as_numpy(out).tobytes())):
            raise Failure("overlap, node_size or exchange changes bits")
    if not c["gradient"] or c["call"] in ("class", "flash", "decode"):
        return
    out, lse = (
        place(name, encode(decode(x), y), c, comm, guards) for name, x, y in (("out", out, form), ("lse", lse, c["of_lse"]))
    )
    backward = library.attention_backward if local else library.ulysses_attention_backward
    how |= {"ctx": ctx[0]} if keep else {}
    wanted = {"slopes_grad": c["slopes_grad"] and bool(c["alibi"]), "bias_grad": c["bias_grad"] and bool(c["bias"])}
    if dlse is not None:
        wanted["dlse"] = place("lse", lse_of(dlse), c, comm, guards)
    if results_of_tokens:
        of_dlse = () if dlse is None else (place("lse", lse_of(dlse, held_by_all), c, comm, guards),)
        how["replicated"] = (*(of_tokens[x] for x in ("dout", "q", "k", "v")), *results_of_tokens, *of_dlse)
    grads = outcome(comm, lambda: backward(dout, q, k, v, out, lse, **options, **more, **how, **wanted), accept)
    if grads is None:
        return
    count = 6 if results_of_tokens else 3
    grads, rest = grads[:count], list(grads[count:])
    results = {"dsinks": (rest.pop(0), c["of_lse"], q, expected["dsinks"])} if c["sinks"] else {}
    if wanted["slopes_grad"]:
        of_slopes = (x[..., 0, 0] if c["alibi"] == "batch" else x[..., 0, 0].sum(0) for x in expected["dslopes"])
        results["dslopes"] = rest.pop(0), c["of_lse"], q, tuple(of_slopes)
    if wanted["bias_grad"]:
        results["dbias"] = rest.pop(0), c["of_lse"], options["bias"], expected["dbias"]
    for of, where, gradients in (("", held, grads[:3]), ("_r", held_by_all, grads[3:])):
        for name, x, given in zip(("dq", "dk", "dv"), gradients, (q, k, v), strict=False):
            results[name + of] = x, form, given, tuple(of_this_rank(y, name, where) for y in expected[name])
    compare(comm, results, guards)


def trade(c, comm):
    """`scatter_heads`, `gather_heads` and `all_to_all_4d` against indexing, exactly."""
    rng, guards, how = np.random.default_rng(c["seed"]), [], {"comm": comm}
    scatter, gather = (2, 1) if c["call"] == "trade" else map(int, rng.permutation(4)[:2])
    shape = [c["batch"], 3, c["group"], c["head_dim"]]
    shape[gather], shape[scatter] = sum(c["rows"]), c["heads"]
    whole = encode(rng.standard_normal(shape), c["form"])
    x = place("x", part(whole, c["rows"], comm.rank, gather), c, comm, guards)

    def exact(y, expected):
        compare(comm, {"result": (y, c["form"], x, (decode(expected).astype(float), np.zeros(expected.shape)))}, guards)

    scattered = [len(x) for x in np.array_split(np.empty(c["heads"]), comm.size)]
    if c["call"] == "4d":
        return exact(
            outcome(comm, lambda: library.all_to_all_4d(x, scatter, gather, comm)), part(whole, scattered, comm.rank, scatter)
        )
    how |= {"node_size": c["node_size"] if c["node_size"] != "all" else comm.size, "exchange": c["exchange"]}
    y = outcome(comm, lambda: library.scatter_heads(x, **how))
    exact(y, part(whole, scattered, comm.rank, 2))
    for z in (y, place("a", as_numpy(y), c, comm, guards) if c["form"] != "bfloat16" else y):
        back = outcome(comm, lambda z=z: library.gather_heads(z, seq_local=c["rows"][comm.rank], **how))
        exact(back, part(whole, c["rows"], comm.rank))
    return None


def merge(c, comm):
    """`merge_attention` of two or three parts, each of which may have seen nothing."""
    rng, guards, form = np.random.default_rng(c["seed"]), [], c["form"]
    shape = (c["batch"], sum(c["rows"]), c["heads"], c["head_dim"])[c["packed"] :]
    parts, placed = [], []
    for name in ("a", "out", "x")[: 2 + c["seed"] % 2]:
        lse = 3 * rng.standard_normal((*shape[:-3], shape[-2], shape[-3]))
        lse = np.where(rng.random(lse.shape) < 0.2, -np.inf, lse).astype(c["of_lse"])
        out = encode(np.where(np.isneginf(oracle.t(lse))[..., None], np.nan, rng.standard_normal(shape)), form)
        parts.append((decode(out).astype(float), lse.astype(float)))
        placed.append((place(name, out, c, comm, guards), place("lse", lse, c, comm, guards)))
    total = placed[0]
    for other in placed[1:]:
        arguments = *total, *other
        total = outcome(comm, lambda x=arguments: library.merge_attention(*x, dtype="bfloat16" if form == "bits" else None))
    out, lse = oracle.merge(parts)
    slack = 64 * UNIT[c["of_lse"]] * (1 + abs(np.where(np.isneginf(lse), 0, lse)))
    out = out, 9 * UNIT[form] + 8 * oracle.t(slack)[..., None] + 0 * out
    compare(
        comm, {"out": (total[0], form, placed[0][0], out), "lse": (total[1], c["of_lse"], placed[0][1], (lse, slack))}, guards
    )


def refuse(c, comm):
    """A call that is wrong on some ranks raises one error on all, which names the argument; the next call works."""
    rng, guards = np.random.default_rng(c["seed"]), []
    shapes = [(c["batch"], sum(c["rows"]), heads, c["head_dim"]) for heads in (c["heads"], c["kv_heads"], c["kv_heads"])]
    arrays = [part(encode(np.ones(shape), c["form"]), c["rows"], comm.rank) for shape in shapes]
    good = {name: place(name, x, c, comm, guards) for name, x in zip("qkv", arrays, strict=True)}
    good |= options_of(c, rng, comm, guards)[0] | {"comm": comm} | ({"dtype": "bfloat16"} if c["form"] == "bits" else {})
    wrong = rng.random(comm.size) < 0.5
    wrong[rng.integers(comm.size)] = True

    def call(arguments):
        options = {name: x for name, x in arguments.items() if name not in "qkv"}
        return library.ulysses_attention(*(arguments[x] for x in "qkv"), **options)

    if not wrong.all() and rng.random() < 0.2:
        name, value = list(DIFFERENT.items())[rng.integers(len(DIFFERENT))]
        value = value if good.get(name) != value else (5, 6) if name == "window_size" else 0
        value = bool(value) if name in ("causal", "return_lse") else value
    else:
        name = list(BAD)[rng.integers(len(BAD))]
        value = BAD[name][rng.integers(len(BAD[name]))]
        value = value(good[name]) if callable(value) and name in "qkv" else value
    result = outcome(
        comm, lambda: call(good | {name: value} if wrong[comm.rank] else good), "^(Type|Value|NotImplemented)Error"
    )
    if result is not None and value is not None and min(c["batch"], sum(c["rows"]), c["heads"], c["kv_heads"]):
        raise Failure(f"{name} = {value!r} was taken")
    outcome(comm, lambda: call(good))


COMMUNICATORS = {}


def run(case):
    """What is wrong with a case, or None; the same on all ranks."""
    faulthandler.dump_traceback_later(250, exit=True)
    c, key = mended(case), (case["ranks"], case["reversed"])
    if key not in COMMUNICATORS:
        COMMUNICATORS[key] = WORLD.Split(
            0 if WORLD.rank < c["ranks"] else MPI.UNDEFINED, -WORLD.rank if c["reversed"] else WORLD.rank
        )
    comm, problem = COMMUNICATORS[key], None
    if comm != MPI.COMM_NULL:
        try:
            {"trade": trade, "4d": trade, "merge": merge, "refuse": refuse}.get(c["call"], attention)(c, comm)
        except Failure as failure:
            problem = str(failure)
    faulthandler.cancel_dump_traceback_later()
    return WORLD.bcast(problem)


def shrink(case, problem, end):
    """The plainest case found until then that fails in the same way, and how it fails."""
    kind, smaller = re.sub(r"[^A-Za-z]+", ".*", problem[:25]), True  # two problems of one kind differ in their numbers
    while smaller:
        smaller = False
        for candidate in simpler(case):
            if WORLD.bcast(time.monotonic() > end):
                return case, problem
            found = run(candidate)
            if found and re.match(kind, found):
                case, problem, smaller = candidate, found, True
                break
    return case, problem


def command(cases, ranks):
    """How to run cases alone: what is not as plain as can be."""
    told = [{x: y for x, y in case.items() if x not in SPACE or y != SPACE[x][1][0]} for case in cases]
    return f"mpiexec -n {ranks} {sys.executable} tests/fuzz.py --replay '{json.dumps(told)}'"


def work(seed, first, seconds, state):
    """Draw and run cases until the time is over; rank 0 notes in a file which one is under way, and how many failed."""
    end, failed = time.monotonic() + seconds, 0
    for number in count(first):
        if WORLD.rank == 0:
            state.write_text(f"{number} {failed}")
        if WORLD.bcast(time.monotonic() > end):
            return
        case = draw(seed, WORLD.size, number)
        problem = run(case)
        if problem:
            failed += 1
            small, text = shrink(case, problem, time.monotonic() + 40) if failed < 6 else (case, problem)
            if WORLD.rank == 0:
                print(f"--- draw {number}: {text[:1500]}\n{command([small], small['ranks'])}", flush=True)


def start(ranks, seconds, *arguments):
    """Run this file on so many ranks, with a time limit: the return code and what it printed."""
    launcher = Path(sys.executable).with_name("mpiexec")
    launcher = [str(launcher) if launcher.exists() else "mpiexec", "-n", str(ranks)]
    command = ["timeout", "-k", "5", str(seconds), *launcher, sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def crash(cases, ranks):
    """The plainest run that was found to end the process as these cases do."""

    def fails(cases):
        return start(ranks, 300, "--replay", json.dumps(cases))[0] not in (0, WRONG)

    if fails(cases[-1:]):
        cases, end = cases[-1:], time.monotonic() + 300
        for candidate in simpler(cases[0]):
            if time.monotonic() < end and fails([cases[0] | {x: y for x, y in candidate.items() if y != cases[0][x]}]):
                cases = [candidate]
    elif not fails(cases):
        return "not again: " + command(cases, ranks)
    return command(cases, ranks)


def drive(seed, minutes, all_ranks):
    """All numbers of ranks in turns, and the count at the end."""
    print(f"seed {seed}", flush=True)
    end, counts, failures = time.monotonic() + 60 * minutes, dict.fromkeys(all_ranks, 0), 0
    share = int(max(20, min(150, 60 * minutes / len(all_ranks))))
    state = Path(tempfile.mkdtemp()) / "state"
    while time.monotonic() < end:
        for ranks in all_ranks:
            state.write_text(f"{counts[ranks]} 0")
            code, text = start(
                ranks, share + 600, "--seed", seed, "--first", counts[ranks], "--seconds", share, "--state", state
            )
            number, failed = map(int, state.read_text().split())
            counts[ranks], failures = number + (code != 0), failures + failed + (code != 0)
            if text.strip():
                print(f"=== {ranks} ranks\n{text[-8000:]}", flush=True)
            if code:  # the process is gone: which of the last draws does it?
                print(f"=== {ranks} ranks ended with {code} in draw {number}", flush=True)
                print(crash([draw(seed, ranks, n) for n in range(max(0, number - 5), number + 1)], ranks), flush=True)
    print(", ".join(f"{n} draws on {ranks}" for ranks, n in counts.items()) + f"; {failures} failed; seed {seed}")
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--replay", type=json.loads, help="cases to run")
    for name, kind in (("first", int), ("seconds", float), ("state", Path)):  # of the driver's own runs
        parser.add_argument(f"--{name}", type=kind)
    given = parser.parse_args()
    if given.replay:
        problems = [run({name: values[0] for name, (_, values) in SPACE.items()} | case) for case in given.replay]
        if WORLD.rank == 0:
            print("\n".join(x or "right" for x in problems))
        sys.exit(WRONG if any(problems) else 0)
    if given.state:
        work(given.seed, given.first, given.seconds, given.state)
    else:
        sys.exit(drive(given.seed, given.minutes, given.ranks))
