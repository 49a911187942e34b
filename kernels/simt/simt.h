// simt.h: the C interface, in the shape of the CUDA driver API. Device addresses are plain numbers; a kernel's
// arguments come as an array of pointers, one to each (cuLaunchKernel's kernelParams).
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
const void* simt_get_function(const char* module, const char* name);  // null if the file `module`.cu has no such kernel; no module: any file
int simt_has_module(const char* module);                              // 1 if it has any
const char* simt_kernel_name(int i);  // in no particular order; null after the last
int simt_param_count(const void* function);
uint32_t simt_param_size(const void* function, int i);
uint64_t simt_alloc(size_t bytes);  // filled with 0xff: NaN as half, bfloat16 or float; 0 and simt_last_error() if there is no memory
int simt_free(uint64_t address);
int simt_memcpy(uint64_t dst, uint64_t src, size_t bytes);  // either may be a host address; 1 if out of an allocation
int simt_memset(uint64_t dst, int value, size_t bytes);
void simt_drain(void);  // kernels launched from here on begin when those before are done; so they do after a copy or a fill
typedef struct {
    uint32_t order;  // in which ready threads run: 0 forward, 1 reverse, 2 random by seed
    uint32_t workers;  // OS threads for the blocks
    uint64_t seed;
} simt_schedule;
// geometry: grid x y z, block x y z, cluster x y z. 0, or 1 and simt_last_error().
int simt_launch(const void* function, const uint32_t* geometry, uint32_t shared_bytes, void** params, const simt_schedule* schedule);
const char* simt_last_error(void);
uint64_t simt_last_bank_conflicts(void);  // ldmatrix wavefronts beyond one per 8x8 matrix, in this thread's last launch
typedef struct {
    uint64_t base;
    uint64_t extents[5];  // elements, innermost first
    uint64_t strides[4];  // bytes, of all dimensions but the innermost
    uint32_t boxes[5];
    uint32_t rank, element_bytes, swizzle_bytes;  // swizzle: 0, 32, 64, 128
    uint32_t is_im2col;
    int32_t lower[2], upper[2];  // along W, H
    uint32_t pixels, pixel_stride[2];
} simt_map_desc;
int simt_tensor_map(void* map /* 128 bytes */, const simt_map_desc* desc);  // 1 where cuTensorMapEncode would refuse
#ifdef __cplusplus
}
#endif
