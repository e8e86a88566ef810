"""
Denoise a photograph
====================

Non-local means is attention: a pixel becomes the mean of all pixels of the picture, weighted by how alike their
surroundings are.

The weight of pixel j for pixel i is ``exp(-|p_i - p_j|² / h²)``, where p is the patch around a pixel. Written out, the
exponent is ``(2 p_i · p_j - |p_j|² - |p_i|²) / h²``. The softmax cancels the last term, so a query ``[2 p, 1] / h²``
and a key ``[p, -|p|²]`` give just these weights. One pixel is one token. The picture has 16384 of them, and each looks
at all others.
"""

import matplotlib.pyplot as plt
import numpy as np
from mpi4py import MPI
from skimage import data, transform

from ulysses_dp import ulysses_attention

comm = MPI.COMM_WORLD

# %%
# The picture, and noise that every rank draws alike.
side, sigma = 128, 0.1
clean = transform.resize(data.camera(), (side, side), anti_aliasing=True)
noisy = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)

# %%
# The patches of 4 x 4 pixels around this rank's pixels: a part of the rows of the picture.
patches = np.lib.stride_tricks.sliding_window_view(np.pad(noisy, (2, 1), mode="reflect"), (4, 4)).reshape(side * side, 16)
mine = slice(comm.rank * side * side // comm.size, (comm.rank + 1) * side * side // comm.size)
p = (patches[mine] - 0.5) / 4  # root mean square differences, of small numbers
norm = (p * p).sum(axis=1, keepdims=True)
one = np.ones_like(norm)

# %%
# Four values of h are four heads. The value is the pixel; zeros fill it up to the width of q and k.
widths = sigma * np.array([0.7, 0.85, 1.0, 1.2])
q = np.stack([np.hstack([2 * p, one]) / h**2 for h in widths], axis=1)[None]
k = np.repeat(np.hstack([p, -norm])[None, :, None], len(widths), axis=2)
v = np.zeros_like(k)
v[..., 0] = noisy.reshape(-1)[mine][:, None]

# %%
# One call: all pixels of all ranks.
q, k, v = (np.ascontiguousarray(x, dtype=np.float32) for x in (q, k, v))
out = ulysses_attention(q, k, v, softmax_scale=1.0)
parts = comm.gather(out[0, :, :, 0])

# %%
# Rank 0 shows the mean of the heads.
if comm.rank == 0:
    denoised = np.concatenate(parts).mean(axis=1).reshape(side, side)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    for ax, (title, picture) in zip(axes, {"noisy": noisy, "denoised": denoised, "clean": clean}.items(), strict=True):
        error = np.sqrt(np.mean((picture - clean) ** 2))
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title if picture is clean else f"{title}, {-20 * np.log10(error):.1f} dB")
        ax.axis("off")
        print(f"{title:9} root mean square error {error:.3f}")
    figure.savefig("denoising.png", dpi=100)

# %%
# ``scripts/denoise.py`` adds a second pass, positions, and shrinkage of cosine coefficients: ``make demo`` runs it.
