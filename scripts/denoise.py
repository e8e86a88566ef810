"""Remove the noise of a photograph by exact non-local means, which is attention.

Non-local means estimates a patch as the mean of all patches of the picture,
weighted by ``exp(-|p_i - p_j|^2 / h^2)``.  The term ``|p_i|^2`` is the same for
all ``j`` and the softmax cancels it, so ``q = [2 p, 1] / h^2`` and
``k = [p, -|p|^2]`` give these weights.  One pixel is one token, every pixel
attends to the whole picture, and eight bandwidths ``h`` are eight heads.

Three additions to the plain method:

* the pixel's position belongs to the token, so that near patches count more;
* the values are the patch's cosine coefficients and their squares.  Attention
  then returns the mean and the variance that each coefficient has among similar
  patches.  Each noisy coefficient is pulled to its mean as far as the variance
  says that it is noise (a Wiener filter);
* a second call compares patches of the first estimate instead of the noisy ones.

The settings below were chosen on small versions of several photographs.  A run
never consults the clean picture except to print the quality of the results.

Run ``mpiexec -n 2 python scripts/denoise.py --out denoise.png``.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from files import Output, on_all_ranks, picture_kind, refuse_clashes
from matplotlib.figure import Figure
from scipy.fft import dctn, idctn
from skimage import color, data, io, transform, util
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means

from ulysses_dp import ulysses_attention

if TYPE_CHECKING:
    from mpi4py import MPI

PICTURES = ("astronaut", "brick", "camera", "chelsea", "coins", "rocket")
SIDE = 4  # pixels along one side of a patch
REACH = 8.0  # pixels at which the weight of a patch has fallen to 1/e
BANDWIDTHS = (np.geomspace(1.2, 2.5, 8), np.geomspace(0.7, 2.0, 8))  # h / sigma, call by call
# A token attends to itself too, which puts some of its own noise into its mean.
# Taking off a little more than the variance of the noise makes up for that.
NOISE_FACTOR = 1.35
# scikit-image's method at the best of 42 settings for the default picture and noise.
WINDOWED = {"patch_size": 7, "patch_distance": 6, "fast_mode": False}
WINDOWED_BANDWIDTH = 0.9  # h / sigma


def load_picture(name: str, size: int) -> np.ndarray:
    """Read a picture as a grey square of `size` x `size` pixels with values in 0..1.

    `name` is one of `PICTURES` or the path of a file.
    """
    picture = util.img_as_float(getattr(data, name)() if name in PICTURES else io.imread(name))
    if picture.ndim == 3:
        picture = color.rgb2gray(picture[..., :3])
    side = min(picture.shape)
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    square = picture[top : top + side, left : left + side]
    return transform.resize(square, (size, size), anti_aliasing=True)


def patches(picture: np.ndarray) -> np.ndarray:
    """Cut the patch around every pixel: an array (pixels, SIDE, SIDE)."""
    before = SIDE // 2
    padded = np.pad(picture, (before, SIDE - 1 - before), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE))
    return windows.reshape(-1, SIDE, SIDE)


def add_patches(estimates: np.ndarray, rows: slice, shape: tuple[int, int]) -> np.ndarray:
    """Add the patches around the pixels `rows` into otherwise empty pictures.

    The patches are an array (heads, len(rows), SIDE, SIDE), the pictures an
    array (heads, height, width) with `shape` = (height, width).
    """
    height, width = shape
    every = np.zeros((len(estimates), height * width, SIDE, SIDE))
    every[:, rows] = estimates
    every = every.reshape(-1, height, width, SIDE, SIDE)
    total = np.zeros((len(estimates), height + SIDE - 1, width + SIDE - 1))
    for i, j in np.ndindex(SIDE, SIDE):
        total[:, i : i + height, j : j + width] += every[..., i, j]
    before = SIDE // 2
    return total[:, before : before + height, before : before + width]


def make_tokens(
    guide: np.ndarray, coefficients: np.ndarray, rows: slice, bandwidths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make q, k and v of the pixels `rows`, each of shape (1, len(rows), heads, head_dim).

    Parameters
    ----------
    guide : ndarray, shape (height, width)
        The picture whose patches are compared.
    coefficients : ndarray, shape (len(rows), SIDE * SIDE)
        What is averaged, next to its squares.
    rows : slice
        The pixels, in reading order.
    bandwidths : ndarray, shape (heads,)
        The root mean square difference of two pixels at which the weight of a
        patch has fallen to 1/e.
    """
    # Only differences matter: small numbers keep the float32 logits accurate.
    look = patches(guide - guide.mean())[rows].reshape(-1, SIDE * SIDE) / SIDE
    middle = (np.array(guide.shape) - 1) / 2
    place = (np.indices(guide.shape).reshape(2, -1).T[rows] - middle) / REACH
    look_norm, place_norm = (np.sum(x * x, axis=1, keepdims=True) for x in (look, place))

    one = np.ones_like(look_norm)
    key = np.hstack([look, -look_norm, place, -place_norm])
    query = np.stack([np.hstack([2 * look / h**2, one / h**2, 2 * place, one]) for h in bandwidths], axis=1)
    value = np.hstack([coefficients, coefficients**2])
    # The call wants one head_dim: zeros fill up the narrower arrays.
    head_dim = max(key.shape[1], value.shape[1])
    q, k, v = np.zeros((3, 1, len(key), len(bandwidths), head_dim), dtype=np.float32)
    q[0, :, :, : query.shape[2]] = query
    k[0, :, :, : key.shape[1]] = key[:, None]
    v[0, :, :, : value.shape[1]] = value[:, None]
    return q, k, v


def shrink(moments: np.ndarray, coefficients: np.ndarray, sigma: float) -> np.ndarray:
    """Pull noisy coefficients to their means, less where they truly vary.

    Parameters
    ----------
    moments : ndarray, shape (pixels, heads, 2 * SIDE * SIDE)
        Mean of every coefficient among similar patches, then mean of its square.
    coefficients : ndarray, shape (pixels, SIDE * SIDE)
        The noisy coefficients of the patches around the pixels.
    sigma : float
        Standard deviation of the noise.
    """
    mean, square = np.split(moments.astype(np.float64), 2, axis=2)
    # Rounding can bring the variance of equal numbers to zero or below.
    variance = np.maximum(square - mean**2, 1e-9)
    gain = np.maximum(variance - NOISE_FACTOR * sigma**2, 0) / variance
    return mean + gain * (coefficients[:, None] - mean)


def estimate(
    noisy: np.ndarray, guide: np.ndarray, sigma: float, bandwidths: np.ndarray, comm: MPI.Comm
) -> tuple[np.ndarray, float]:
    """Denoise `noisy` with the similarities found in `guide`, by one attention call.

    Returns
    -------
    pictures : ndarray, shape (heads, height, width)
        The estimate of every bandwidth, on all ranks.
    seconds : float
        Duration of the attention call.
    """
    share, extra = divmod(noisy.size, comm.size)
    first = comm.rank * share + min(comm.rank, extra)
    rows = slice(first, first + share + (comm.rank < extra))
    level = noisy.mean()
    spectra = dctn(patches(noisy - level)[rows], axes=(1, 2), norm="ortho")
    coefficients = spectra.reshape(-1, SIDE * SIDE)
    q, k, v = make_tokens(guide, coefficients, rows, bandwidths)
    comm.Barrier()
    start = time.perf_counter()
    out = ulysses_attention(q, k, v, comm=comm, softmax_scale=1.0)
    seconds = time.perf_counter() - start

    clean = shrink(out[0, :, :, : 2 * SIDE * SIDE], coefficients, sigma).transpose(1, 0, 2)
    clean = idctn(clean.reshape(*clean.shape[:2], SIDE, SIDE), axes=(2, 3), norm="ortho")
    part = np.ascontiguousarray(add_patches(clean, rows, noisy.shape))
    total = np.empty_like(part)
    comm.Allreduce(part, total)
    overlap = add_patches(np.ones((1, noisy.size, SIDE, SIDE)), slice(None), noisy.shape)
    return level + total / overlap, seconds


def quality(clean: np.ndarray, picture: np.ndarray) -> float:
    """Peak signal-to-noise ratio of `picture`, clipped to 0..1, in dB."""
    return peak_signal_noise_ratio(clean, np.clip(picture, 0, 1), data_range=1)


def save_comparison(path: Path, kind: str, clean: np.ndarray, noisy: np.ndarray, denoised: np.ndarray) -> None:
    """Save the three pictures side by side, as a file of a kind."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    pictures = {"noisy": noisy, "denoised": denoised, "clean": clean}
    for axes, (title, picture) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        decibels = "" if picture is clean else f", {quality(clean, picture):.2f} dB"
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set_title(title + decibels)
        axes.axis("off")
    figure.savefig(path, dpi=120, format=kind)


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(PICTURES)
    parser.add_argument("--image", default="camera", help=f"{names}, or the path of a file")
    parser.add_argument("--size", type=int, default=128, help="side of the picture in pixels")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise, for values in 0..1")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--out", default="denoise.png", help="picture to write")
    arguments = parser.parse_args()
    if arguments.size < SIDE:
        parser.error(f"--size must be at least {SIDE}, the side of a patch")
    if not 0 < arguments.sigma <= 1:
        parser.error("--sigma must be above 0 and at most 1")
    if arguments.seed < 0:
        parser.error("--seed must not be negative")
    if arguments.image not in PICTURES and not Path(arguments.image).is_file():
        parser.error(f"--image must be a file or one of {names}")
    try:
        refuse_clashes({"--image": arguments.image}, {"--out": arguments.out})
        picture_kind(arguments.out)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    """Denoise one picture; a file that cannot be read or written ends all ranks before the work."""
    arguments = parse_arguments()
    # Importing MPI starts it, which wrong arguments should not do.
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    # The picture is small and the seed fixed: every rank makes all of it.
    clean = on_all_ranks(comm, lambda: load_picture(arguments.image, arguments.size))
    with on_all_ranks(comm, lambda: Output(arguments.out) if comm.rank == 0 else nullcontext()) as out:
        compare(clean, arguments, out, comm)


def compare(clean: np.ndarray, arguments: argparse.Namespace, out: Output | None, comm: MPI.Comm) -> None:
    """Denoise a picture and compare with the windowed method of scikit-image; rank 0 prints and writes."""
    sigma = arguments.sigma
    noisy = clean + sigma * np.random.default_rng(arguments.seed).standard_normal(clean.shape)

    guide = noisy
    calls = []  # what to print of each attention call
    for bandwidths in BANDWIDTHS:
        heads, seconds = estimate(noisy, guide, sigma, sigma * bandwidths, comm)
        guide = heads.mean(axis=0)
        calls.append((sigma * bandwidths, heads, guide, seconds))
    if out is None:
        return

    print(f"{arguments.image}, {arguments.size} x {arguments.size}, noise {sigma:g}")
    print(f"{clean.size} tokens, {len(heads)} heads, ranks: {comm.size}")
    print(f"PSNR noisy: {quality(clean, noisy):.2f} dB")
    for number, (bandwidths, heads, combined, seconds) in enumerate(calls, start=1):
        print(f"call {number}: attention took {seconds:.2f} s")
        print("  h      " + "".join(f"{h:8.3f}" for h in bandwidths) + "    mean of heads")
        decibels = [quality(clean, head) for head in heads]
        print("  PSNR dB" + "".join(f"{x:8.2f}" for x in decibels), end="")
        print(f"{quality(clean, combined):9.2f}")
    windowed = denoise_nl_means(noisy, h=WINDOWED_BANDWIDTH * sigma, sigma=sigma, **WINDOWED)
    print(f"PSNR scikit-image denoise_nl_means: {quality(clean, windowed):.2f} dB")
    settings = ", ".join(f"{key}={value}" for key, value in WINDOWED.items())
    print(f"  with h={WINDOWED_BANDWIDTH} * sigma, sigma=sigma, {settings}")
    save_comparison(out.part, picture_kind(arguments.out), clean, noisy, guide)
    out.complete()


if __name__ == "__main__":
    main()
