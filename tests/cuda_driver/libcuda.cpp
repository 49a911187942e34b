// A libcuda.so for tests: the part of the CUDA driver API that kiln uses, over the SIMT layer.
//
// The seam below the real driver code: with it, CudaDriver itself runs without a GPU. It is stricter than the
// vendor's library where that is silent: every call needs a current context, a destroyed object is an error, and
// queued work is done as late as possible, when somebody waits for its own stream, so that a missing wait shows.
// Written from the "CUDA Driver API" manual; only what the tests of this folder need.
//
// A module is a fatbin, of which only the magic number is looked at and whose kernels may be any, or an image of the
// tests: the magic number, kTestImage, and the module's name, whose kernels are those of that file.
//
// Environment: SIMULATED_CUDA_SIMT names the SIMT library, SIMULATED_CUDA_MEMORY the bytes of the device,
// SIMULATED_CUDA_COMPILED_FOR what kernels were compiled for (90), SIMULATED_CUDA_UNFIT modules without code for the
// device ("all", or names between commas); with SIMULATED_CUDA_HASTY an event that is asked says that it is over when it is
// not, as if nobody had asked.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "simt.h"

#define API extern "C" __attribute__((visibility("default"))) int
enum { kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidDevice = 101, kInvalidImage = 200, kInvalidContext = 201, kNoBinary = 209,
       kInvalidHandle = 400, kNotFound = 500, kNotReady = 600, kLaunchFailed = 719, kNotPermitted = 800, kStreamCapture = 901,
       kInvalidClusterSize = 912 };

namespace {
struct Layer {
    template <class F> void get(F*& f, const char* name) { f = reinterpret_cast<F*>(dlsym(handle, name)); }
    void* handle = nullptr;
    decltype(simt_get_function)* function;
    decltype(simt_param_count)* param_count;
    decltype(simt_param_size)* param_size;
    decltype(simt_alloc)* alloc;
    decltype(simt_free)* free;
    decltype(simt_memcpy)* memcpy;
    decltype(simt_memset)* memset;
    decltype(simt_launch)* launch;
    decltype(simt_last_error)* last_error;
    decltype(simt_tensor_map)* tensor_map;
};

constexpr uint32_t kTestImage = 0x7e57;
struct Stream { bool is_capturing = false; std::vector<std::function<int()>> recorded; std::deque<std::function<int()>> queue; };
struct Event { bool is_timed; Stream* stream = nullptr; uint64_t recorded = 0, done = 0; };  // how often
struct Module { std::string name; };
struct Graph { std::vector<std::function<int()>> calls; };
struct Function { const void* kernel; std::string name; bool is_loaded = false; int dynamic_shared = 48 << 10; };

std::recursive_mutex lock;
Layer layer;
std::set<Stream*> streams;
int sticky = kOk;                        // a failed kernel spoils the context
std::set<void*> alive;                   // streams, events, graphs, functions and the rest
std::map<uint64_t, size_t> allocations, leaving;
size_t memory = size_t(1) << 30, used = 0, reserved = 0;
int context_count = 0;
int the_context;
thread_local void* current = nullptr;
std::string calls;

struct Guard {
    Guard() { lock.lock(); }
    ~Guard() { lock.unlock(); }
};
#define ENTER Guard guard; if (!current) return kInvalidContext; if (sticky) return sticky
#define ALIVE(p) if (!alive.count(p)) return kInvalidHandle

void run_next(Stream* s) {
    auto call = std::move(s->queue.front());
    s->queue.pop_front();
    if (int error = call(); error && !sticky) sticky = error;
}
void flush(Stream* s) {
    while (!s->queue.empty()) run_next(s);
}
void flush() {
    for (Stream* s : streams) flush(s);
}
void wait_for(Event* e, uint64_t record) {
    while (e->done < record && !e->stream->queue.empty()) run_next(e->stream);
}
int enqueue(void* stream, std::function<int()> call) {
    ALIVE(stream);
    auto* s = static_cast<Stream*>(stream);
    if (s->is_capturing) s->recorded.push_back(std::move(call));
    else s->queue.push_back(std::move(call));
    return kOk;
}
int make(void** out, void* object) { alive.insert(object); *out = object; return kOk; }
int destroy(void* object) { ALIVE(object); alive.erase(object); return kOk; }  // never freed: the address stays unique
}  // namespace

// What the test asks: the calls so far, and how many objects are left.
extern "C" __attribute__((visibility("default"))) const char* simulated_cuda_calls() { Guard guard; static std::string copy; copy = calls; return copy.c_str(); }
extern "C" __attribute__((visibility("default"))) int simulated_cuda_alive() { Guard guard; return int(alive.size() + allocations.size()) + context_count; }

API cuInit(unsigned) {
    Guard guard;
    if (const char* bytes = getenv("SIMULATED_CUDA_MEMORY")) memory = strtoull(bytes, nullptr, 10);
    const char* path = getenv("SIMULATED_CUDA_SIMT");
    layer.handle = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!layer.handle) return kNoDevice;
    layer.get(layer.function, "simt_get_function"), layer.get(layer.param_count, "simt_param_count"), layer.get(layer.param_size, "simt_param_size");
    layer.get(layer.alloc, "simt_alloc"), layer.get(layer.free, "simt_free"), layer.get(layer.memcpy, "simt_memcpy"), layer.get(layer.memset, "simt_memset");
    layer.get(layer.launch, "simt_launch"), layer.get(layer.last_error, "simt_last_error"), layer.get(layer.tensor_map, "simt_tensor_map");
    return kOk;
}
API cuGetErrorName(int error, const char** text) { *text = error == kLaunchFailed ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_SIMULATED"; return kOk; }
API cuGetErrorString(int, const char** text) { *text = "an error of the simulated driver"; return kOk; }
API cuDriverGetVersion(int* version) { *version = 13000; return kOk; }
API cuDeviceGetCount(int* count) { *count = 1; return kOk; }
API cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal == 0 ? kOk : kInvalidDevice; }
API cuDeviceGetName(char* name, int length, int) { snprintf(name, size_t(length), "simulated GPU"); return kOk; }
API cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = memory; return kOk; }
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 75: *value = 9; break;          // compute capability major
        case 76: *value = 0; break;          // minor
        case 16: *value = 8; break;          // multiprocessors
        case 97: *value = 227 << 10; break;  // shared memory of a block, opt-in
        case 38: *value = 1 << 20; break;    // L2 cache
        default: return kInvalidValue;
    }
    return kOk;
}
API cuDevicePrimaryCtxRetain(void** context, int) { Guard guard; context_count++; *context = &the_context; return kOk; }
API cuDevicePrimaryCtxRelease_v2(int) { Guard guard; return context_count-- > 0 ? kOk : kInvalidContext; }
API cuCtxGetCurrent(void** context) { *context = current; return kOk; }
API cuCtxSetCurrent(void* context) { current = context; return kOk; }
API cuCtxSynchronize() { ENTER; flush(); return sticky; }

API cuStreamCreate(void** stream, unsigned flags) { ENTER; if (flags != 1) return kInvalidValue; auto* s = new Stream; streams.insert(s); return make(stream, s); }
API cuStreamDestroy_v2(void* stream) { ENTER; ALIVE(stream); flush(static_cast<Stream*>(stream)); streams.erase(static_cast<Stream*>(stream)); return destroy(stream); }
API cuStreamSynchronize(void* stream) {
    ENTER;
    ALIVE(stream);
    if (static_cast<Stream*>(stream)->is_capturing) return kStreamCapture;
    flush(static_cast<Stream*>(stream));
    return sticky;
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
    ENTER;
    ALIVE(event);
    auto* e = static_cast<Event*>(event);
    return enqueue(stream, [e, record = e->recorded] { wait_for(e, record); return kOk; });
}

API cuEventCreate(void** event, unsigned flags) { ENTER; return make(event, new Event{flags != 2}); }
API cuEventDestroy_v2(void* event) { ENTER; return destroy(event); }
API cuEventRecord(void* event, void* stream) {
    ENTER;
    ALIVE(event);
    auto* e = static_cast<Event*>(event);
    e->stream = static_cast<Stream*>(stream);
    return enqueue(stream, [e, record = ++e->recorded] { e->done = record; return kOk; });
}
static bool is_done(const Event* e) { return e->done == e->recorded; }
API cuEventQuery(void* event) { ENTER; ALIVE(event); return getenv("SIMULATED_CUDA_HASTY") || is_done(static_cast<Event*>(event)) ? kOk : kNotReady; }
API cuEventSynchronize(void* event) { ENTER; ALIVE(event); auto* e = static_cast<Event*>(event); wait_for(e, e->recorded); return sticky; }
API cuEventElapsedTime_v2(float* ms, void* from, void* to) {
    ENTER;
    ALIVE(from);
    ALIVE(to);
    for (auto* e : {static_cast<Event*>(from), static_cast<Event*>(to)})
        if (!e->is_timed || !e->recorded) return kInvalidHandle;
        else if (!is_done(e)) return kNotReady;
    *ms = 0.5f;
    return kOk;
}

struct PoolProps { int alloc_type, handle_types, location_type, location_id; void* security; size_t max_size; uint16_t usage; uint8_t reserved[54]; };
API cuMemPoolCreate(void** pool, const PoolProps* props) {
    ENTER;
    static_assert(sizeof(PoolProps) == 88, "CUmemPoolProps");
    if (props->alloc_type != 1 || props->location_type != 1 || props->location_id != 0 || props->usage) return kInvalidValue;
    return make(pool, new int);
}
API cuMemPoolDestroy(void* pool) { ENTER; return destroy(pool); }
API cuMemPoolSetAttribute(void* pool, int attribute, void* value) { ENTER; ALIVE(pool); return attribute == 4 && *static_cast<uint64_t*>(value) == UINT64_MAX ? kOk : kInvalidValue; }
API cuMemPoolGetAttribute(void* pool, int attribute, void* value) {
    ENTER;
    ALIVE(pool);
    if (attribute != 5 && attribute != 7) return kInvalidValue;
    *static_cast<uint64_t*>(value) = attribute == 5 ? reserved : used;
    return kOk;
}
API cuMemPoolTrimTo(void* pool, size_t keep) { ENTER; ALIVE(pool); reserved = used > keep ? used : keep; return kOk; }
API cuMemAllocFromPoolAsync(uint64_t* ptr, size_t bytes, void* pool, void* stream) {
    ENTER;
    ALIVE(pool);
    ALIVE(stream);
    if (!bytes || static_cast<Stream*>(stream)->is_capturing) return kInvalidValue;
    if (used + bytes > memory) return kOutOfMemory;
    *ptr = layer.alloc(bytes);
    if (!*ptr) return kOutOfMemory;
    allocations[*ptr] = bytes;
    used += bytes;
    if (used > reserved) reserved = used;
    return kOk;
}
API cuMemFreeAsync(uint64_t ptr, void* stream) {
    ENTER;
    auto found = allocations.find(ptr);
    if (found == allocations.end()) return kInvalidValue;
    size_t bytes = found->second;
    allocations.erase(found);
    return enqueue(stream, [ptr, bytes] { used -= bytes; return layer.free(ptr) ? kInvalidValue : kOk; });
}
API cuMemGetInfo_v2(size_t* free, size_t* total) { ENTER; *free = memory - reserved, *total = memory; return kOk; }
API cuMemHostAlloc(void** ptr, size_t bytes, unsigned) { ENTER; return make(ptr, malloc(bytes)); }
API cuMemFreeHost(void* ptr) { ENTER; flush(); return destroy(ptr); }
static int copy(uint64_t dst, uint64_t src, size_t bytes, void* stream) {
    return enqueue(stream, [=] { return layer.memcpy(dst, src, bytes) ? kInvalidValue : kOk; });
}
API cuMemcpyHtoDAsync_v2(uint64_t dst, const void* src, size_t bytes, void* stream) { ENTER; return copy(dst, uint64_t(src), bytes, stream); }
API cuMemcpyDtoHAsync_v2(void* dst, uint64_t src, size_t bytes, void* stream) { ENTER; return copy(uint64_t(dst), src, bytes, stream); }
API cuMemcpyDtoDAsync_v2(uint64_t dst, uint64_t src, size_t bytes, void* stream) { ENTER; return copy(dst, src, bytes, stream); }
API cuMemsetD8Async(uint64_t dst, unsigned char value, size_t bytes, void* stream) {
    ENTER;
    if (!bytes) return kInvalidValue;
    return enqueue(stream, [=] { return layer.memset(dst, value, bytes) ? kInvalidValue : kOk; });
}

API cuModuleLoadData(void** module, const void* image) {
    ENTER;
    const auto* words = static_cast<const uint32_t*>(image);
    if (uint64_t(image) % 8 || words[0] != 0xba55ed50) return kInvalidImage;
    const std::string name = words[1] == kTestImage ? reinterpret_cast<const char*>(words + 2) : "";
    const char* unfit = getenv("SIMULATED_CUDA_UNFIT");
    const std::string list = "," + std::string(unfit ? unfit : "") + ",";
    if (list == ",all," || (!name.empty() && list.find("," + name + ",") != std::string::npos)) return kNoBinary;
    calls += "load " + name + "\n";
    return make(module, new Module{name});
}
API cuModuleUnload(void* module) { ENTER; return destroy(module); }
API cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER;
    ALIVE(module);
    const std::string& file = static_cast<Module*>(module)->name;
    const void* kernel = layer.function(file.empty() ? nullptr : file.c_str(), name);
    if (!kernel) return kNotFound;
    *function = new Function{kernel, name};
    return kOk;
}
API cuFuncLoad(void* function) { ENTER; static_cast<Function*>(function)->is_loaded = true; return kOk; }
API cuFuncGetAttribute(int* value, int attribute, void*) {
    ENTER;
    const char* compiled_for = getenv("SIMULATED_CUDA_COMPILED_FOR");
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;                         // most threads, registers
    if (attribute == 5) *value = compiled_for ? atoi(compiled_for) : 90;  // "PTX_VERSION"
    return kOk;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER;
    if (attribute != 8 || value > 227 << 10) return kInvalidValue;
    static_cast<Function*>(function)->dynamic_shared = value;
    return kOk;
}
API cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    ENTER;
    const void* kernel = static_cast<Function*>(function)->kernel;
    if (index >= size_t(layer.param_count(kernel))) return kInvalidValue;
    *offset = 0, *size = layer.param_size(kernel, int(index));
    return kOk;
}

struct Attribute { int id; char pad[4]; union { char pad64[64]; struct { unsigned x, y, z; } cluster; int overlaps; }; };
struct Config { unsigned grid[3], block[3], shared; void* stream; Attribute* attributes; unsigned count; };
API cuOccupancyMaxActiveClusters(int* count, void* function, const Config* config) {
    ENTER;
    auto* f = static_cast<Function*>(function);
    if (!f->is_loaded || int(config->shared) > f->dynamic_shared) return kInvalidValue;
    unsigned size = 0;
    for (unsigned i = 0; i < config->count; i++)
        if (config->attributes[i].id == 4) size = config->attributes[i].cluster.x;
    // "The cluster size must be specified in config, else the function will return an error."
    if (!size || config->grid[0] % size) return kInvalidValue;
    if (size > 8) return kInvalidClusterSize;
    *count = size == 1 ? 8 : 1;  // the simulated device is small
    return kOk;
}
API cuLaunchKernelEx(const Config* config, void* function, void** params, void**) {
    ENTER;
    static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56, "CUlaunchConfig");
    auto* f = static_cast<Function*>(function);
    if (!f->is_loaded || int(config->shared) > f->dynamic_shared) return kInvalidValue;
    std::vector<uint32_t> geometry{config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1], config->block[2], 1, 1, 1};
    int overlaps = 0;
    for (unsigned i = 0; i < config->count; i++) {
        const Attribute& a = config->attributes[i];
        if (a.id == 4) geometry[6] = a.cluster.x, geometry[7] = a.cluster.y, geometry[8] = a.cluster.z;
        else if (a.id == 6) overlaps = a.overlaps;
        else return kInvalidValue;
    }
    char line[256];
    snprintf(line, sizeof line, "launch %s grid %u %u %u cluster %u %u %u overlaps %d\n", f->name.c_str(), geometry[0], geometry[1], geometry[2], geometry[6], geometry[7], geometry[8], overlaps);
    calls += line;
    std::vector<std::vector<char>> values;
    for (int i = 0; i < layer.param_count(f->kernel); i++) {
        const char* p = static_cast<const char*>(params[i]);
        values.emplace_back(p, p + layer.param_size(f->kernel, i));
    }
    unsigned shared = config->shared;
    return enqueue(config->stream, [=]() mutable {
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(value.data());
        const simt_schedule forward{0, 2, 1};
        if (!layer.launch(f->kernel, geometry.data(), shared, pointers.data(), &forward)) return kOk;
        fprintf(stderr, "simulated driver: %s\n", layer.last_error());
        return kLaunchFailed;
    });
}

API cuStreamBeginCapture_v2(void* stream, int mode) {
    ENTER;
    ALIVE(stream);
    auto* s = static_cast<Stream*>(stream);
    if (mode != 2 || s->is_capturing) return kStreamCapture;
    s->is_capturing = true;
    s->recorded.clear();
    return kOk;
}
API cuStreamEndCapture(void* stream, void** graph) {
    ENTER;
    ALIVE(stream);
    auto* s = static_cast<Stream*>(stream);
    if (!s->is_capturing) return kStreamCapture;
    s->is_capturing = false;
    return make(graph, new Graph{std::move(s->recorded)});
}
API cuGraphInstantiateWithFlags(void** run, void* graph, unsigned long long) { ENTER; ALIVE(graph); return make(run, new Graph{static_cast<Graph*>(graph)->calls}); }
API cuGraphDestroy(void* graph) { ENTER; return destroy(graph); }
API cuGraphExecDestroy(void* run) { ENTER; flush(); return destroy(run); }
API cuGraphLaunch(void* run, void* stream) {
    ENTER;
    ALIVE(run);
    for (auto& call : static_cast<Graph*>(run)->calls)
        if (int error = enqueue(stream, call)) return error;
    return kOk;
}

static int encode(void* map, int type, uint32_t rank, void* base, const uint64_t* extents, const uint64_t* strides, simt_map_desc& desc, int swizzle) {
    desc.base = uint64_t(base), desc.rank = rank, desc.element_bytes = type == 7 ? 4 : 2, desc.swizzle_bytes = swizzle ? 16u << swizzle : 0;
    for (uint32_t i = 0; i < rank; i++) desc.extents[i] = extents[i];
    for (uint32_t i = 0; i + 1 < rank; i++) desc.strides[i] = strides[i];
    return layer.tensor_map(map, &desc) ? kInvalidValue : kOk;
}
API cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* base, const uint64_t* extents, const uint64_t* strides, const uint32_t* boxes, const uint32_t* steps,
                           int, int swizzle, int, int) {
    ENTER;
    simt_map_desc desc{};
    for (uint32_t i = 0; i < rank; i++) {
        desc.boxes[i] = boxes[i];
        if (steps[i] != 1) return kInvalidValue;
    }
    return encode(map, type, rank, base, extents, strides, desc, swizzle);
}
API cuTensorMapEncodeIm2col(void* map, int type, uint32_t rank, void* base, const uint64_t* extents, const uint64_t* strides, const int* lower, const int* upper,
                            uint32_t channels, uint32_t pixels, const uint32_t* steps, int, int swizzle, int, int) {
    ENTER;
    simt_map_desc desc{};
    desc.is_im2col = 1, desc.boxes[0] = channels, desc.pixels = pixels;
    for (uint32_t i = 1; i < rank && i < 5; i++) desc.boxes[i] = 1;  // im2col mode has no box
    for (int i = 0; i < 2; i++) desc.lower[i] = lower[i], desc.upper[i] = upper[i], desc.pixel_stride[i] = steps[i + 1];
    if (steps[0] != 1 || steps[3] != 1) return kInvalidValue;
    return encode(map, type, rank, base, extents, strides, desc, swizzle);
}
