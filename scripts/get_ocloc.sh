#!/usr/bin/env bash
# Fetch today's ocloc, Intel's offline compiler for its GPUs, for scripts/gpu_report.py.
#
#     scripts/get_ocloc.sh [FOLDER]
#
# Takes Debian's packages of its newest suite, unpacked into FOLDER (default: ~/.cache/ulysses_dp/sid, or $GPU_TOOLS/sid);
# nothing is installed. With them comes Intel's Level Zero driver, which `make nullgpu` uses. Prints the path of ocloc last.
set -euo pipefail

tools=${GPU_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/ulysses_dp}
folder=$(realpath --canonicalize-missing "${1:-$tools/sid}")
here=$(dirname "$(realpath "$0")")
# ocloc loads its compiler by name: no dependency of the package says so
"$here/../tools/gpu/debian_root.sh" sid "$folder" ocloc intel-ocloc libigc2 libigdfcl2 libze-intel-gpu1 libze1 >&2
echo "ocloc $("$folder/bin/ocloc" query OCL_DRIVER_VERSION)" >&2
echo "$folder/bin/ocloc"
