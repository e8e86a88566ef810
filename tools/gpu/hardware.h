// What Intel's compiler for GPUs has built in: sub-groups of 16 lanes, block reads, 2-D block reads, the matrix engine. Written in
// terms of what includes this file must give: BUILT_IN (attributes of a function), lane(), sub_group(), and
//
//     u32 from_lane(u32 x, u32 l)           x of lane l, in all lanes
//     void from_lanes(u32 x, u32 all[16])   x of every lane, in all lanes
//     void same_in_lanes(u64 x)             stop if x is not the same in all lanes: the hardware takes that of one
//     void on_surface(…)                    stop if a 2-D block read breaks the hardware's rules
//
// Each function has the mangled name under which SPIR-V, translated to LLVM, calls it.
#define AS1 __attribute__((address_space(1)))
#define NAMED(symbol) __asm__(symbol)
#define LANES 16
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
#ifdef __NVPTX__
typedef unsigned long long u64; typedef long long i64;
#else
typedef unsigned long u64; typedef long i64;
#endif
#define VECTOR(type, n) typedef type type##x##n __attribute__((ext_vector_type(n)))
VECTOR(u16, 2); VECTOR(u16, 4); VECTOR(u16, 8); VECTOR(u16, 16); VECTOR(u16, 32); VECTOR(u16, 64);
VECTOR(u32, 2); VECTOR(u32, 4); VECTOR(u32, 8); VECTOR(u32, 16); VECTOR(u32, 32);
VECTOR(u64, 2); VECTOR(u64, 4); VECTOR(u64, 8);
VECTOR(short, 2); VECTOR(short, 8); VECTOR(int, 2); VECTOR(int, 8); VECTOR(float, 2); VECTOR(float, 8);
#ifdef __NVPTX__
VECTOR(_Float16, 2);
#endif

static BUILT_IN u32 lane(void);
static BUILT_IN u32 sub_group(void);
static BUILT_IN u32 from_lane(u32 x, u32 l);
static BUILT_IN void from_lanes(u32 x, u32 *all);
static BUILT_IN void same_in_lanes(u64 x);
static BUILT_IN void on_surface(i64 base, int width, int height, int pitch);

#define BITS(type, x) __builtin_bit_cast(type, x)
// a function with a mangled name: DEFINE(result, name, symbol, (parameters)) { body }
#define DEFINE(result, name, symbol, parameters) BUILT_IN result name parameters NAMED(symbol); BUILT_IN result name parameters

// ---- sub-groups
DEFINE(u32, sg_lane, "_Z22get_sub_group_local_idv", (void)) { return lane(); }
DEFINE(u32, sg_id, "_Z16get_sub_group_idv", (void)) { return sub_group(); }
DEFINE(u32, sg_size, "_Z18get_sub_group_sizev", (void)) { return LANES; }
DEFINE(u32, sg_bu, "_Z19sub_group_broadcastjj", (u32 x, u32 l)) { return from_lane(x, l); }
DEFINE(int, sg_bi, "_Z19sub_group_broadcastij", (int x, u32 l)) { return (int)from_lane((u32)x, l); }
DEFINE(float, sg_bf, "_Z19sub_group_broadcastfj", (float x, u32 l)) { return BITS(float, from_lane(BITS(u32, x), l)); }
DEFINE(u64, sg_bm, "_Z19sub_group_broadcastmj", (u64 x, u32 l)) { return from_lane((u32)x, l) | (u64)from_lane((u32)(x >> 32), l) << 32; }
DEFINE(i64, sg_bl, "_Z19sub_group_broadcastlj", (i64 x, u32 l)) { return (i64)sg_bm((u64)x, l); }
DEFINE(double, sg_bd, "_Z19sub_group_broadcastdj", (double x, u32 l)) { return BITS(double, sg_bm(BITS(u64, x), l)); }
DEFINE(u32, sg_xu, "_Z27intel_sub_group_shuffle_xorjj", (u32 x, u32 m)) { u32 all[LANES]; from_lanes(x, all); return all[lane() ^ m]; }
DEFINE(int, sg_xi, "_Z27intel_sub_group_shuffle_xorij", (int x, u32 m)) { return (int)sg_xu((u32)x, m); }
#define REDUCE(type, name, symbol, combine) \
    DEFINE(type, name, symbol, (type x)) { \
        u32 all[LANES]; from_lanes(BITS(u32, x), all); \
        type r = BITS(type, all[0]); for (int i = 1; i < LANES; i++) { type y = BITS(type, all[i]); r = combine; } return r; }
REDUCE(float, sg_maxf, "_Z20sub_group_reduce_maxf", r > y ? r : y)
REDUCE(float, sg_minf, "_Z20sub_group_reduce_minf", r < y ? r : y)
REDUCE(float, sg_addf, "_Z20sub_group_reduce_addf", r + y)
REDUCE(int, sg_maxi, "_Z20sub_group_reduce_maxi", r > y ? r : y)
REDUCE(int, sg_mini, "_Z20sub_group_reduce_mini", r < y ? r : y)
REDUCE(int, sg_addi, "_Z20sub_group_reduce_addi", r + y)
REDUCE(int, sg_any, "_Z13sub_group_anyi", (r != 0) | (y != 0))
REDUCE(int, sg_all, "_Z13sub_group_alli", (r != 0) & (y != 0))
DEFINE(double, sg_addd, "_Z20sub_group_reduce_addd", (double x)) {
    u64 bits = BITS(u64, x); u32 low[LANES], high[LANES]; from_lanes((u32)bits, low); from_lanes((u32)(bits >> 32), high);
    double r = BITS(double, low[0] | (u64)high[0] << 32);
    for (int i = 1; i < LANES; i++) { u64 y = low[i] | (u64)high[i] << 32; r += BITS(double, y); }
    return r; }

// ---- block reads: lane l gets number 16 i + l in its i-th element
#define BLOCK_READ(type, name, symbol) \
    DEFINE(type, name, symbol, (const AS1 type *p)) { same_in_lanes((u64)p); return p[lane()]; }
#define BLOCK_READ_N(type, n, name, symbol) \
    DEFINE(type##x##n, name, symbol, (const AS1 type *p)) { \
        same_in_lanes((u64)p); type##x##n r; for (int i = 0; i < n; i++) r[i] = p[LANES * i + lane()]; return r; }
BLOCK_READ(u32, br1, "_Z26intel_sub_group_block_readPU3AS1Kj")
BLOCK_READ_N(u32, 2, br2, "_Z27intel_sub_group_block_read2PU3AS1Kj")
BLOCK_READ_N(u32, 4, br4, "_Z27intel_sub_group_block_read4PU3AS1Kj")
BLOCK_READ_N(u32, 8, br8, "_Z27intel_sub_group_block_read8PU3AS1Kj")
BLOCK_READ(u16, brs1, "_Z29intel_sub_group_block_read_usPU3AS1Kt")
BLOCK_READ_N(u16, 2, brs2, "_Z30intel_sub_group_block_read_us2PU3AS1Kt")
BLOCK_READ_N(u16, 4, brs4, "_Z30intel_sub_group_block_read_us4PU3AS1Kt")
BLOCK_READ_N(u16, 8, brs8, "_Z30intel_sub_group_block_read_us8PU3AS1Kt")
BLOCK_READ(u64, brl1, "_Z29intel_sub_group_block_read_ulPU3AS1Km")
BLOCK_READ_N(u64, 2, brl2, "_Z30intel_sub_group_block_read_ul2PU3AS1Km")
BLOCK_READ_N(u64, 4, brl4, "_Z30intel_sub_group_block_read_ul4PU3AS1Km")
BLOCK_READ_N(u64, 8, brl8, "_Z30intel_sub_group_block_read_ul8PU3AS1Km")
DEFINE(void, bw1, "_Z27intel_sub_group_block_writePU3AS1jj", (AS1 u32 *p, u32 x)) { same_in_lanes((u64)p); p[lane()] = x; }

// ---- 2-D block reads: of a surface in bytes (width, height and pitch less one), zeros outside of it; place: column, row
static BUILT_IN int outside(int width, int height, int bytes, int x, int y) { return x < 0 || y < 0 || bytes * x > width || y > height; }
static BUILT_IN u16 at16(i64 base, int w, int h, int p, int x, int y) { return outside(w, h, 2, x, y) ? 0 : ((const AS1 u16 *)base)[(i64)y * ((p + 1) / 2) + x]; }
static BUILT_IN u32 at32(i64 base, int w, int h, int p, int x, int y) { return outside(w, h, 4, x, y) ? 0 : ((const AS1 u32 *)base)[(i64)y * ((p + 1) / 4) + x]; }
#define SURFACE_READ(type, n, rows, columns, name, symbol, at) \
    DEFINE(type##x##n, name, symbol, (i64 base, int w, int h, int p, intx2 place)) { \
        same_in_lanes(base); same_in_lanes((u32)place.x | (u64)(u32)place.y << 32); on_surface(base, w, h, p); type##x##n r; \
        for (int c = 0; c < columns; c++) for (int i = 0; i < rows; i++) r[c * rows + i] = at(base, w, h, p, place.x + LANES * c + (int)lane(), place.y + i); \
        return r; }
#define SURFACE "__builtin_IB_subgroup_block_read_flat_"
SURFACE_READ(u16, 8, 8, 1, sr16_8, SURFACE "u16_m8k16v1", at16)
SURFACE_READ(u16, 16, 8, 2, sr16_8_2, SURFACE "u16_m8k16v2", at16)
SURFACE_READ(u16, 16, 16, 1, sr16_16, SURFACE "u16_m16k16v1", at16)
SURFACE_READ(u16, 32, 16, 2, sr16_16_2, SURFACE "u16_m16k16v2", at16)
SURFACE_READ(u16, 32, 32, 1, sr16_32, SURFACE "u16_m32k16v1", at16)
SURFACE_READ(u16, 64, 32, 2, sr16_32_2, SURFACE "u16_m32k16v2", at16)
SURFACE_READ(u32, 2, 2, 1, sr32_2, SURFACE "u32_m2k16v1", at32)
SURFACE_READ(u32, 4, 4, 1, sr32_4, SURFACE "u32_m4k16v1", at32)
SURFACE_READ(u32, 8, 8, 1, sr32_8, SURFACE "u32_m8k16v1", at32)
SURFACE_READ(u32, 16, 16, 1, sr32_16, SURFACE "u32_m16k16v1", at32)
SURFACE_READ(u32, 32, 32, 1, sr32_32, SURFACE "u32_m32k16v1", at32)
DEFINE(u32x8, sr_t8, SURFACE "transpose_u32_k8", (i64 base, int w, int h, int p, intx2 place)) {
    same_in_lanes(base); on_surface(base, w, h, p);
    u32x8 r; for (int j = 0; j < 8; j++) r[j] = at32(base, w, h, p, place.x + j, place.y + (int)lane()); return r; }
DEFINE(void, sr_p, "__builtin_IB_subgroup_block_read_prefetch_u16_m8k16v2", (i64 base, int w, int h, int p, intx2 place, int cache)) {}

// ---- the matrix engine: D (8 x 16) = C + A (8 x 16) B (16 x 16); lane l holds column l, two rows of B in one int
static BUILT_IN float of_bf16(u32 x) { return BITS(float, x << 16); }
#define DPAS(name, symbol, value) \
    DEFINE(floatx8, name, symbol, (shortx8 a, intx8 b, floatx8 c)) { \
        for (int m = 0; m < 8; m++) { \
            u32 row[LANES]; from_lanes((u16)a[m], row); float sum = c[m]; \
            for (int k = 0; k < LANES; k++) sum += value(row[k] & 0xffff) * value((u32)b[k / 2] >> 16 * (k & 1) & 0xffff); \
            c[m] = sum; } \
        return c; }
DPAS(dpas_bf, "_Z40intel_sub_group_bf16_bf16_matrix_mad_k16Dv8_sDv8_iDv8_f", of_bf16)
DEFINE(shortx2, to_bf2, "_Z34intel_convert_bfloat162_as_ushort2Dv2_f", (floatx2 x)) {
    shortx2 r; for (int i = 0; i < 2; i++) { float y = x[i]; u32 u = BITS(u32, y); r[i] = (short)((u + 0x7fff + (u >> 16 & 1)) >> 16); } return r; }
