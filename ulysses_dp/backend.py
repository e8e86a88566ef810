"""The local attention backends by name."""

import enum


class AttnType(enum.Enum):
    """Which implementation computes attention on one rank.

    ``INTEL_SYCL`` is the numba-dpex kernel of this package, on any SYCL device. ``NUMPY`` is the dense float64 reference on
    the host, for comparison: its memory grows with seq_q x seq_k.

    Examples
    --------
    >>> from ulysses_dp import AttnType
    >>> AttnType("numpy")
    <AttnType.NUMPY: 'numpy'>
    """

    INTEL_SYCL = "intel_sycl"
    NUMPY = "numpy"
