// Built-ins for NVIDIA GPUs: those of OpenCL C that the kernels use, and Intel's; a sub-group is half a warp. What must be the
// same in all lanes, and the rules of 2-D block reads, are checked: a trap ends the launch with an error.
#define BUILT_IN __attribute__((always_inline, convergent))
#include "hardware.h"
#define STOP_IF(bad) do { if (bad) __builtin_trap(); } while (0)

static BUILT_IN u32 lane(void) { return __nvvm_read_ptx_sreg_tid_x() % LANES; }
static BUILT_IN u32 sub_group(void) { return __nvvm_read_ptx_sreg_tid_x() / LANES; }
static BUILT_IN u32 from_lane(u32 x, u32 l) { return __nvvm_shfl_sync_idx_i32(0xffffu << (__nvvm_read_ptx_sreg_laneid() & LANES), x, l, 0x101f); }
static BUILT_IN void from_lanes(u32 x, u32 *all) {
#pragma unroll
    for (int i = 0; i < LANES; i++) all[i] = from_lane(x, i); }
static BUILT_IN void same_in_lanes(u64 x) { u32 mixed = (u32)x ^ (u32)(x >> 32) * 0x9E3779B1u; STOP_IF(from_lane(mixed, 0) != mixed); }
static BUILT_IN void on_surface(i64 base, int w, int h, int p) { STOP_IF((base & 63) || (p + 1 & 15) || p + 1 < 64 || w + 1 < 64 || (w + 1 & 3)); }

// ---- work-items of one dimension
DEFINE(i64, group_id, "_Z12get_group_idj", (u32 d)) { return d ? 0 : __nvvm_read_ptx_sreg_ctaid_x(); }
DEFINE(i64, local_id, "_Z12get_local_idj", (u32 d)) { return d ? 0 : __nvvm_read_ptx_sreg_tid_x(); }
DEFINE(i64, local_size, "_Z14get_local_sizej", (u32 d)) { return d ? 1 : __nvvm_read_ptx_sreg_ntid_x(); }
DEFINE(i64, num_groups, "_Z14get_num_groupsj", (u32 d)) { return d ? 1 : __nvvm_read_ptx_sreg_nctaid_x(); }
DEFINE(i64, global_id, "_Z13get_global_idj", (u32 d)) { return d ? 0 : (i64)__nvvm_read_ptx_sreg_ctaid_x() * __nvvm_read_ptx_sreg_ntid_x() + __nvvm_read_ptx_sreg_tid_x(); }
DEFINE(void, barrier, "_Z7barrierj", (u32 flags)) { __nvvm_bar_sync(0); }

// ---- arithmetic, by NVIDIA's library where there is more to it
#define MATH(name) float __nv_##name##f(float); double __nv_##name(double)
MATH(exp2); MATH(exp); MATH(log); MATH(log2); MATH(tanh);
#define ONE(name, letters, call32, call64) \
    DEFINE(float, name##_f, "_Z" letters "f", (float x)) { return call32; } \
    DEFINE(double, name##_d, "_Z" letters "d", (double x)) { return call64; } \
    DEFINE(floatx8, name##_v, "_Z" letters "Dv8_f", (floatx8 v)) { for (int i = 0; i < 8; i++) { float x = v[i]; v[i] = call32; } return v; }
ONE(exp2_, "4exp2", __nv_exp2f(x), __nv_exp2(x))
ONE(exp_, "3exp", __nv_expf(x), __nv_exp(x))
ONE(log_, "3log", __nv_logf(x), __nv_log(x))
ONE(log2_, "4log2", __nv_log2f(x), __nv_log2(x))
ONE(tanh_, "4tanh", __nv_tanhf(x), __nv_tanh(x))
ONE(fabs_, "4fabs", __builtin_fabsf(x), __builtin_fabs(x))
ONE(native_exp2_, "11native_exp2", __nvvm_ex2_approx_f(x), __nv_exp2(x))
ONE(native_log2_, "11native_log2", __nvvm_lg2_approx_f(x), __nv_log2(x))
ONE(native_recip_, "12native_recip", 1.0f / x, 1.0 / x)
#define TWO(name, letters, call32, call64) \
    DEFINE(float, name##_f, "_Z" letters "ff", (float x, float y)) { return call32; } \
    DEFINE(double, name##_d, "_Z" letters "dd", (double x, double y)) { return call64; } \
    DEFINE(floatx8, name##_v, "_Z" letters "Dv8_fS_", (floatx8 v, floatx8 w)) { for (int i = 0; i < 8; i++) { float x = v[i], y = w[i]; v[i] = call32; } return v; }
TWO(fmax_, "4fmax", __builtin_fmaxf(x, y), __builtin_fmax(x, y))
TWO(fmin_, "4fmin", __builtin_fminf(x, y), __builtin_fmin(x, y))
#define THREE(name, letters) \
    DEFINE(float, name##_f, "_Z" letters "fff", (float x, float y, float z)) { return __builtin_fmaf(x, y, z); } \
    DEFINE(double, name##_d, "_Z" letters "ddd", (double x, double y, double z)) { return __builtin_fma(x, y, z); } \
    DEFINE(floatx8, name##_v, "_Z" letters "Dv8_fS_S_", (floatx8 u, floatx8 v, floatx8 w)) { for (int i = 0; i < 8; i++) { float x = u[i], y = v[i], z = w[i]; u[i] = __builtin_fmaf(x, y, z); } return u; }
THREE(mad_, "3mad")
THREE(fma_, "3fma")
DEFINE(i64, abs_l, "_Z3absl", (i64 x)) { return x < 0 ? -x : x; }
DEFINE(int, abs_i, "_Z3absi", (int x)) { return x < 0 ? -x : x; }
static BUILT_IN float of_f16(u32 x) { return (float)BITS(_Float16, (u16)x); }
DPAS(dpas_hf, "_Z38intel_sub_group_f16_f16_matrix_mad_k16Dv8_sDv8_iDv8_f", of_f16)
DEFINE(_Float16x2, to_hf2, "_Z13convert_half2Dv2_f", (floatx2 x)) { _Float16x2 r; for (int i = 0; i < 2; i++) r[i] = (_Float16)x[i]; return r; }
