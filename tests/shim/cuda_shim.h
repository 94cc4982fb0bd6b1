// CUDA on the CPU, as far as the kernels of cupyep use it: enough to run the very same .cu file with g++.
//
// A block's threads run one after the other on a fiber. A thread that meets a barrier is set aside with its fiber and the
// next thread starts on a new one; once all have arrived they go on in order. A kernel without barriers so costs no
// switch. Blocks run in order, so __shared__ memory is static. What this cannot show: races, and anything about speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static

struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

static dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace shim {

const size_t STACK_BYTES = 256 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    unsigned thread = 0;
    bool waiting = false;
    void* fake_stack = nullptr;
};

struct Block {
    void (*body)(void*);
    void* data;
    unsigned next;
    ucontext_t scheduler;
    void* fake_stack = nullptr;
    const void* stack_bottom = nullptr;
    size_t stack_size = 0;
    Fiber* current;
};

static Block block;
static std::vector<std::unique_ptr<Fiber>> fibers;

// AddressSanitizer must be told which stack is in use.
static void leave(void** fake_stack, const void* bottom, size_t size)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#else
    (void)fake_stack, (void)bottom, (void)size;
#endif
}

static void arrive(void* fake_stack, const void** bottom, size_t* size)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
#else
    (void)fake_stack, (void)bottom, (void)size;
#endif
}

static void to_scheduler(Fiber* fiber, bool for_good)
{
    leave(for_good ? nullptr : &fiber->fake_stack, block.stack_bottom, block.stack_size);
    swapcontext(&fiber->context, &block.scheduler);
    arrive(fiber->fake_stack, &block.stack_bottom, &block.stack_size);
}

static void resume(Fiber* fiber)
{
    block.current = fiber;
    leave(&block.fake_stack, fiber->stack.get(), STACK_BYTES);
    swapcontext(&block.scheduler, &fiber->context);
    arrive(block.fake_stack, nullptr, nullptr);
}

static void run_threads()
{
    Fiber* fiber = block.current;
    arrive(nullptr, &block.stack_bottom, &block.stack_size);
    while (block.next < blockDim.x) {
        fiber->thread = threadIdx.x = block.next++;
        block.body(block.data);
    }
    to_scheduler(fiber, true);
}

static void start(Fiber* fiber)
{
    fiber->waiting = false;
    fiber->fake_stack = nullptr;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_threads, 0);
    resume(fiber);
}

static void run_block()
{
    block.next = 0;
    size_t used = 0;
    while (block.next < blockDim.x) {
        if (used == fibers.size()) fibers.emplace_back(new Fiber);
        start(fibers[used++].get());
    }
    for (;;) {
        unsigned waiting = 0;
        for (size_t i = 0; i < used; ++i) waiting += fibers[i]->waiting;
        if (waiting == 0) return;
        if (waiting != blockDim.x) {
            std::fprintf(stderr, "shim: %u of %u threads reached a barrier\n", waiting, blockDim.x);
            std::abort();
        }
        for (size_t i = 0; i < used; ++i) {
            fibers[i]->waiting = false;
            threadIdx.x = fibers[i]->thread;
            resume(fibers[i].get());
        }
    }
}

template <typename... P, size_t... I>
void run(void (*kernel)(P...), void** arguments, std::index_sequence<I...>)
{
    auto once = [&] { kernel(*static_cast<typename std::remove_const<P>::type*>(arguments[I])...); };
    block.body = [](void* data) { (*static_cast<decltype(once)*>(data))(); };
    block.data = &once;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
}

// `arguments` holds the address of each argument, as in cuLaunchKernel.
template <typename... P> void launch(void (*kernel)(P...), void** arguments)
{
    run(kernel, arguments, std::index_sequence_for<P...>());
}

struct Instance {
    const char* name;
    void (*launch)(void** arguments);
};

}  // namespace shim

inline void __syncthreads()
{
    shim::Fiber* fiber = shim::block.current;
    fiber->waiting = true;
    shim::to_scheduler(fiber, false);
    shim::block.current = fiber;
}
