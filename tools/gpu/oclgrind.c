// Built-ins for Oclgrind, which has all of OpenCL C but no sub-groups: lanes exchange numbers through local memory, between
// barriers. So a sub-group operation that not all lanes of a work-group reach is reported, as a barrier that diverges.
#define BUILT_IN __attribute__((always_inline))
#define LOCAL __attribute__((address_space(3)))
#include "hardware.h"
#define MAX_SUB_GROUPS 64

LOCAL u32 box[MAX_SUB_GROUPS * LANES];
u64 local_id(u32) NAMED("_Z12get_local_idj");
void barrier(u32) NAMED("_Z7barrierj");

static BUILT_IN u32 lane(void) { return (u32)local_id(0) % LANES; }
static BUILT_IN u32 sub_group(void) { return (u32)local_id(0) / LANES; }
static BUILT_IN u32 from_lane(u32 x, u32 l) {
    LOCAL u32 *own = box + sub_group() * LANES;
    if (lane() == l) own[l] = x;
    barrier(1); u32 y = own[l]; barrier(1); return y; }
static BUILT_IN void from_lanes(u32 x, u32 *all) {
    LOCAL u32 *own = box + sub_group() * LANES;
    own[lane()] = x;
    barrier(1); for (int i = 0; i < LANES; i++) all[i] = own[i]; barrier(1); }
// An address that differs between lanes, or a surface against the rules, becomes a read of nothing, which Oclgrind reports.
static BUILT_IN void stop_if(int bad) { if (bad) *(volatile AS1 u32 *)16; }
static BUILT_IN void same_in_lanes(u64 x) { u32 mixed = (u32)x ^ (u32)(x >> 32) * 0x9E3779B1u; stop_if(from_lane(mixed, 0) != mixed); }
static BUILT_IN void on_surface(i64 base, int w, int h, int p) { stop_if((base & 63) || (p + 1 & 15) || p + 1 < 64 || w + 1 < 64 || (w + 1 & 3)); }
