"""Ulysses sequence-parallel attention for dpnp, dpctl and NumPy arrays over MPI."""

from ._device.queue import use_cpu_runtime_of_the_wheels as _use_cpu_runtime_of_the_wheels

_use_cpu_runtime_of_the_wheels()  # before the first import that could ask SYCL for its devices

from ._device.queue import default_queue  # noqa: E402
from ._device.workspace import free_workspace  # noqa: E402
from .attention import attention, ulysses_attention  # noqa: E402
from .backends import AttnType, register_attention  # noqa: E402
from .backward import attention_backward, ulysses_attention_backward  # noqa: E402
from .decode import decode_attention  # noqa: E402
from .flash_attn import (  # noqa: E402
    ulysses_flash_attn_func,
    ulysses_flash_attn_kvpacked_func,
    ulysses_flash_attn_qkvpacked_func,
    ulysses_flash_attn_varlen_func,
    ulysses_flash_attn_varlen_kvpacked_func,
    ulysses_flash_attn_varlen_qkvpacked_func,
)
from .layer import LongContextAttention, UlyssesAttention  # noqa: E402
from .machine import Machine  # noqa: E402
from .merge import merge_attention, merge_attention_backward  # noqa: E402
from .mesh import Mesh  # noqa: E402
from .orders import row_positions, shard_rows, unshard_rows  # noqa: E402
from .plan import plan  # noqa: E402
from .redistribute import all_to_all_4d, gather_heads, order_ranks, scatter_heads  # noqa: E402
from .tracing import trace  # noqa: E402

__all__ = [
    "AttnType",
    "LongContextAttention",
    "Machine",
    "Mesh",
    "UlyssesAttention",
    "all_to_all_4d",
    "attention",
    "attention_backward",
    "decode_attention",
    "default_queue",
    "free_workspace",
    "gather_heads",
    "merge_attention",
    "merge_attention_backward",
    "order_ranks",
    "plan",
    "register_attention",
    "row_positions",
    "scatter_heads",
    "shard_rows",
    "trace",
    "ulysses_attention",
    "ulysses_attention_backward",
    "ulysses_flash_attn_func",
    "ulysses_flash_attn_kvpacked_func",
    "ulysses_flash_attn_qkvpacked_func",
    "ulysses_flash_attn_varlen_func",
    "ulysses_flash_attn_varlen_kvpacked_func",
    "ulysses_flash_attn_varlen_qkvpacked_func",
    "unshard_rows",
]
