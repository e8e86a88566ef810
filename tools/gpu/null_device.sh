#!/usr/bin/env bash
# A program on Intel's real Level Zero driver, without a GPU: kernels are compiled by the driver's compiler with the flags of a
# run, memory is allocated, launches are encoded and come back, but nothing is computed: results are what was in the memory.
#
#     [CARDS=1] [TILES=1] null_device.sh PROGRAM ARGUMENTS…
#
# The devices are Intel Data Center GPUs Max (pvc), CARDS of them with 1 or 2 TILES each; ZE_FLAT_DEVICE_HIERARCHY is up to the
# caller. The driver is the one that scripts/get_ocloc.sh fetches; the program starts by the loader that belongs to it, because
# the system's C library may be older than it demands.
set -euo pipefail

folder=${GPU_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/ulysses_dp}/sid
libraries=$folder/root/usr/lib/x86_64-linux-gnu
tiles=${TILES:-1}
export ZE_ENABLE_ALT_DRIVERS=$libraries/libze_intel_gpu.so.1 ONEAPI_DEVICE_SELECTOR=level_zero:gpu
# 5: commands are thrown away
export NEOReadDebugKeys=1 SetCommandStreamReceiver=5 UseAubStream=0 ProductFamilyOverride=pvc HardwareInfoOverride=1x8x8
export CreateMultipleRootDevices=${CARDS:-1} CreateMultipleSubDevices=$((tiles > 1 ? tiles : 0))
exec "$folder/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" "$@"
