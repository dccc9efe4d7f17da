// What flash.cu needs of CUDA, in C++20 on a CPU: every thread of a block is a thread, blocks run one after another.
// It is stricter than a GPU: shared memory starts as NaN, a copy makes its target NaN until it is waited for, and a
// misaligned address, a bank conflict of load_matrices or shared memory written past its end stops the program.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define ON_CPU
#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(...)
using std::max, std::min;

struct Dim3 {
    int x, y, z;
};
thread_local Dim3 threadIdx, blockIdx;
Dim3 gridDim;

constexpr int LARGEST_BLOCK = 128;
std::barrier<>* block_barrier;
std::barrier<>* warp_barriers[LARGEST_BLOCK / 32];

void __syncthreads() { block_barrier->arrive_and_wait(); }
void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }

// What each lane of the warp says, as an array. Two boards in turn: one is read while the next is written.
template <class Message>
const Message* tell_the_warp(const Message& message) {
    alignas(16) static unsigned char boards[LARGEST_BLOCK / 32][2][32 * 64];
    static thread_local int turn;
    Message* board = (Message*)boards[threadIdx.x / 32][turn ^= 1];
    static_assert(sizeof message <= 64);
    std::memcpy(board + threadIdx.x % 32, &message, sizeof message);
    __syncwarp();
    return board;
}

float __shfl_xor_sync(unsigned, float x, int step) { return tell_the_warp(x)[(threadIdx.x % 32) ^ step]; }

void insist(bool fact, const char* otherwise) {
    if (!fact) std::fputs(otherwise, stderr), std::abort();
}

void aligned(const void* pointer, int bytes) { insist((std::uintptr_t)pointer % bytes == 0, "misaligned address\n"); }

// --- copies ---

struct Copy {
    void* to;
    const void* from;
    int bytes;
};
thread_local std::vector<Copy> copies;

template <int BYTES>
void copy_async(void* to, const void* from, bool present) {
    aligned(to, BYTES), aligned(from, BYTES);
    std::memset(to, 0xff, BYTES);
    copies.push_back({to, present ? from : nullptr, BYTES});
}

void wait_for_copies() {
    for (Copy copy : copies)
        if (copy.from)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            std::memset(copy.to, 0, copy.bytes);
    copies.clear();
}

// --- float16 and the tensor cores ---

float to_float(float x) { return x; }

float to_float(unsigned short x) {
    _Float16 half;
    std::memcpy(&half, &x, 2);
    return half;
}

unsigned pack(float first, float second) {
    const _Float16 both[] = {(_Float16)first, (_Float16)second};
    unsigned bits;
    std::memcpy(&bits, both, 4);
    return bits;
}

template <bool TRANSPOSE>
void load_matrices(unsigned (&x)[4], const void* row) {
    aligned(row, 16);
    const auto rows = tell_the_warp((const unsigned short*)row);
    const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    for (int i = 0; i < 4; i++) {
        int eighths = 0;  // of the 32 banks, four each: one for each row, or the GPU reads them one after another
        for (int r = 0; r < 8; r++) eighths |= 1 << (std::uintptr_t)rows[8 * i + r] / 16 % 8;
        insist(eighths == 255, "bank conflict\n");
        auto at = [&](int r, int c) { return TRANSPOSE ? rows[8 * i + c][r] : rows[8 * i + r][c]; };
        x[i] = at(r, c) | at(r, c + 1) << 16;
    }
}

// The layouts are those of the PTX manual's figures for mma.m16n8k16 with .f16 operands.
void mma(float* upper, float* lower, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Operands {
        unsigned a[4], b[2];
    };
    const Operands* all = tell_the_warp(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    auto half = [](unsigned both, int which) { return to_float((unsigned short)(both >> 16 * which)); };
    auto A = [&](int row, int k) { return half(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2); };
    auto B = [&](int k, int column) { return half(all[column * 4 + k % 8 / 2].b[k / 8], k % 2); };
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < 2; i++) {
            upper[i] += A(row, k) * B(k, column + i);
            lower[i] += A(row + 8, k) * B(k, column + i);
        }
}

// --- launching ---

constexpr int MOST_SHARED = 227 << 10;  // bytes that a block may have on an H100
extern struct Quad shared[];

template <auto kernel>
struct OnCpu;

template <class... Parameters, void (*kernel)(Parameters...)>
struct OnCpu<kernel> {
    static void launch(int x, int y, int z, int block, int shared_bytes, Parameters... arguments) {
        gridDim = {x, y, z};
        block_barrier = new std::barrier<>(block);
        for (int i = 0; i < block / 32; i++) warp_barriers[i] = new std::barrier<>(32);
        unsigned char *start = (unsigned char*)shared, *end = start + MOST_SHARED;
        std::vector<std::thread> threads;
        for (int i = 0; i < block; i++)
            threads.emplace_back([=] {
                threadIdx = {i, 0, 0};
                for (int n = 0; n < x * y * z; n++) {
                    blockIdx = {n % x, n / x % y, n / x / y};
                    if (i == 0) std::fill(start, end, 0xff);
                    __syncthreads();
                    kernel(arguments...);
                    copies.clear();
                    __syncthreads();
                    bool intact = i || std::all_of(start + shared_bytes, end, [](int byte) { return byte == 0xff; });
                    insist(intact, "more shared memory used than asked for\n");
                }
            });
        for (std::thread& thread : threads) thread.join();
        delete block_barrier;
        for (int i = 0; i < block / 32; i++) delete warp_barriers[i];
    }
};
